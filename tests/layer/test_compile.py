"""torch.compile, autocast, and how the operators behave under PyTorch's transforms."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import bae_fast as bf
from bae_fast.baselines import make_baseline
from bae_fast.ops import registry, schemas

N, D, F = 21, 6, 40
TERMS = ("recon", "entropy", "covariance")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(TERMS, n)]
SURROGATES = ("identity", "rectangle", "sigmoid", "official")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module(**options) -> bf.BinaryAutoencoder:
    options = {"impl": "torch", "surrogate_width": 0.8, **options}
    bae = bf.BinaryAutoencoder(D, F, **options)
    bae.fit_normalization_(torch.randn(100, D) * 2 + 1)
    return bae.init_density_(torch.randn(100, D), 0.3)


def loss_of(bae, x, subset=TERMS, mask=None):
    out = bae(x, covariance="covariance" in subset, mask=mask)
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    if "recon" in subset:
        total = total + bae.mse(out, x)
    if "entropy" in subset:
        total = total + 0.3 * out.entropy
    if "covariance" in subset:
        total = total + 0.2 * out.covariance
    return total


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_the_whole_module_is_one_graph(how):
    bae = bf.BinaryAutoencoder(6, 40).requires_grad_(how != "frozen")
    x = torch.randn(30, 6)
    want = bae(x, covariance=True)
    graph = compiled(lambda x: tuple(bae(x, covariance=True)[:3]))
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with context.get(how, contextlib.nullcontext)():
        found = graph(x)
    for got, expected in zip(found, want[:3], strict=True):
        torch.testing.assert_close(got, expected)


def gradients(bae) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in bae.named_parameters()}


def assert_same_gradients(actual, expected, tolerance: float = 0.0) -> None:
    """The operators are the same in both; only sums around them may be ordered otherwise."""
    for name, want in gradients(expected).items():
        got = gradients(actual)[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == want.dtype
            assert (got - want).abs().max() <= tolerance * want.abs().max(), name


# -- torch.compile -----------------------------------------------------------------------------


def test_a_compiled_module_returns_the_same_output_with_a_code():
    bae, x = module(), torch.randn(N, D)
    out, want = compiled(bae)(x, covariance=True), bae(x, covariance=True)
    assert type(out) is bf.BAEOutput
    assert out.code.equal(want.code)
    for name in TERMS:
        assert torch.equal(getattr(out, name), getattr(want, name))
    out.recon.sum().backward()
    assert bae.W_enc.grad is not None


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_a_compiled_training_step_has_the_gradients_of_eager(subset):
    bae, x = module(), torch.randn(N, D)
    eager = copy.deepcopy(bae)
    step = compiled(lambda x: loss_of(bae, x, subset))
    got, want = step(x), loss_of(eager, x, subset)
    assert torch.equal(got, want)
    got.backward()
    want.backward()
    assert eager.W_enc.grad.any()
    # where nothing depends on a parameter, a compiled graph may give zeros for None
    for name, grad in gradients(eager).items():
        found = bae.get_parameter(name).grad
        if grad is None and found is not None:
            assert not found.any(), name
            bae.get_parameter(name).grad = None
    assert_same_gradients(bae, eager)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_compiles_with_a_mask_and_a_gradient_at_x(surrogate):
    bae = module(surrogate=surrogate, surrogate_width=None)
    eager = copy.deepcopy(bae)
    keep = torch.rand(N) < 0.7
    x = torch.randn(N, D, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    compiled(lambda x: loss_of(bae, x, mask=keep))(x).backward()
    loss_of(eager, twin, mask=keep).backward()
    assert_same_gradients(bae, eager)
    assert torch.equal(x.grad, twin.grad)


FROZEN = [
    ("W_enc",), ("b_enc",), ("W_dec", "b_dec"), ("W_enc", "b_enc"), ("W_enc", "W_dec", "b_dec"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("frozen", "subset"),
    [
        pytest.param(
            frozen, subset, id=f"{'+'.join(frozen)}-{'+'.join(subset)}",
            marks=[] if (i + j) % 2 == 0 else pytest.mark.long,
        )
        for i, frozen in enumerate(FROZEN)
        for j, subset in enumerate([TERMS, ("recon",)])
    ],
)  # fmt: skip
def test_frozen_parameters_get_no_gradient_compiled_or_not(frozen, subset):
    bae, x = module(), torch.randn(N, D)
    for name in frozen:
        bae.get_parameter(name).requires_grad_(False)
    eager = copy.deepcopy(bae)
    compiled(lambda x: loss_of(bae, x, subset))(x).backward()
    loss_of(eager, x, subset).backward()
    assert {n for n, g in gradients(bae).items() if g is None} == set(frozen)
    assert_same_gradients(bae, eager)


def test_an_entropy_of_a_module_with_a_frozen_encoder_asks_for_nothing():
    bae, x = module(), torch.randn(N, D)
    bae.W_enc.requires_grad_(False)
    bae.b_enc.requires_grad_(False)
    bae(x).entropy.backward()
    assert all(grad is None for grad in gradients(bae).values())


def test_common_statistics_pass_through_a_compiled_step():
    bae, x = module(), torch.randn(N, D)
    eager = copy.deepcopy(bae)
    stats = bae.encode(torch.cat([x, torch.randn(30, D)])).statistics(covariance=True)
    for one, run in ((bae, compiled(bae)), (eager, eager)):
        out = run(x, covariance=True, stats=stats)
        (one.mse(out, x) + out.entropy + out.covariance).backward()
    assert_same_gradients(bae, eager)


def test_past_statistics_and_the_multilinear_slope_compile():
    bae, x = module(), torch.randn(N, D)
    eager = copy.deepcopy(bae)
    past = bae.encode(torch.randn(30, D)).statistics()
    for one, run in ((bae, compiled(bae)), (eager, eager)):
        out = run(x, covariance=True, past=past, multilinear=True)
        (one.mse(out, x) + out.entropy + out.covariance).backward()
    assert_same_gradients(bae, eager)


def test_encode_and_decode_compile():
    bae, x = module(n_bits=2), torch.randn(N, D)
    assert compiled(bae.encode)(x).equal(bae.encode(x))
    code = bae.encode(x)
    got, want = compiled(bae.decode)(code), bae.decode(code)
    assert torch.equal(got, want)
    got.sum().backward()
    assert bae.W_dec.grad.any()


@pytest.mark.slow
def test_inductor_trains_as_eager_does():
    bae, x = module(), torch.randn(N, D)
    eager = copy.deepcopy(bae)
    for one, run in (
        (bae, compiled(lambda x: loss_of(bae, x), backend="inductor")),
        (eager, lambda x: loss_of(eager, x)),
    ):
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            run(x).backward()
            optimizer.step()
    # fused sums are ordered otherwise: fp32 rounding of sums of N D terms
    assert_same_gradients(bae, eager, tolerance=1e-5)


@pytest.mark.parametrize("terms", [TERMS, ("recon", "entropy")], ids="+".join)
def test_batches_of_any_size_share_one_compiled_graph(terms):
    bae = module()
    eager = copy.deepcopy(bae)
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(lambda x: loss_of(bae, x, terms), backend=counter)
    for n in (9, 12, 31, 32, 33, 70):
        x = torch.randn(n, D)
        bae.zero_grad()
        eager.zero_grad()
        step(x).backward()
        loss_of(eager, x, terms).backward()
        assert_same_gradients(bae, eager)
    assert counter.frame_count == 2  # the first size, then all others


def test_a_batch_dimension_marked_dynamic_compiles_once():
    bae = module()
    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(lambda x: loss_of(bae, x), backend=counter)
    for n in (9, 33, 64):
        x = torch.randn(n, D)
        torch._dynamo.mark_dynamic(x, 0)
        step(x).backward()
    assert counter.frame_count == 1


def test_an_explicit_choice_that_cannot_be_served_says_why_inside_compile():
    bae, x = module(), torch.randn(N, D)
    bae.impl = "cuda"
    with pytest.raises(Exception, match="impl='cuda' cannot serve"):
        compiled(bae)(x)


# -- autocast and half precision ---------------------------------------------------------------


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_autocast_gives_half_reconstructions_wide_statistics_and_fp32_gradients(compile_it):
    bae, x = module(covariance=True), torch.randn(N, D)
    run = compiled(bae) if compile_it else bae
    with torch.autocast("cpu", torch.bfloat16):
        out = run(x)
        loss = bae.mse(out, x) + 0.3 * out.entropy + 0.2 * out.covariance
    assert out.recon.dtype == torch.bfloat16
    assert out.entropy.dtype == out.covariance.dtype == torch.float32
    loss.backward()
    for parameter in bae.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_compiled_autocast_has_the_bits_and_gradients_of_eager_autocast():
    bae, x = module(), torch.randn(N, D)
    eager = copy.deepcopy(bae)

    def step(one, x):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(one, x)

    compiled(lambda x: step(bae, x))(x).backward()
    step(eager, x).backward()
    assert_same_gradients(bae, eager)


def test_autocast_counts_are_not_rounded_to_half():
    # 300 is no bf16 number: rounded products would give other counts and signs
    x = torch.randn(700, D)
    bae = module()
    with torch.autocast("cpu", torch.bfloat16):
        out = bae(x, covariance=True)
    bits = out.code.to_dense(torch.float64)
    counts, joint = bits.sum(0), bits.t() @ bits
    v = 700 * joint - torch.outer(counts, counts)
    expected = (v.abs().sum() - v.diagonal().abs().sum()) / (700 * 699)
    assert torch.equal(out.code.counts().double(), counts)
    assert out.covariance.item() == expected.float().item()


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_half_precision_parameters_train(compile_it):
    bae = module(covariance=True).to(torch.bfloat16)
    x = torch.randn(N, D, dtype=torch.bfloat16)
    eager = copy.deepcopy(bae)
    run = compiled(lambda x: loss_of(bae, x)) if compile_it else (lambda x: loss_of(bae, x))
    run(x).backward()
    loss_of(eager, x).backward()
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(bae).values())
    assert_same_gradients(bae, eager)


def test_float64_stays_float64_under_autocast():
    bae, x = module().double(), torch.randn(N, D, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = bae(x)
    assert out.recon.dtype == out.entropy.dtype == torch.float64
    assert torch.equal(out.recon, bae(x).recon)


# -- the raw operators -------------------------------------------------------------------------


BACKENDS = [
    name
    for name in registry.BACKENDS
    if not registry.reasons_against(name, registry.Request("cpu", torch.float32))
]


def operator_arguments(name: str, n_bits: int = 1) -> list[tuple]:
    """Argument lists of one raw operator that reach every optional argument."""
    k = F * n_bits
    x, w_enc, b_enc = torch.randn(N, D), torch.randn(D, k), torch.randn(k)
    w_dec, b_dec, grad = torch.randn(F, D), torch.randn(D), torch.randn(N, D)
    mask = torch.rand(N) < 0.7
    ops = registry.BACKENDS["torch"].ops
    words, window, counts, n_rows = ops["encode"](x, w_enc, b_enc, mask, 0.5)
    _, signs = ops["covariance"](words, counts, n_rows, True)
    one = torch.ones(())
    return {
        "encode": [(x, w_enc, b_enc, None, None), (x, w_enc, b_enc, mask, 0.5)],
        "decode": [(words, w_dec, b_dec, n_bits, torch.float32),
                   (words, w_dec, b_dec, n_bits, torch.bfloat16)],
        "covariance": [(words, counts, n_rows, True), (words, counts, n_rows, False)],
        "terms": [(counts, n_rows, None, torch.float32),
                  (counts, n_rows, signs.sum(), torch.float64)],
        "slopes": [(counts, n_rows, one, torch.float32)],
        "decoder_backward": [(words, grad, k, n_bits, torch.float32),
                             (words, grad.bfloat16(), k, n_bits, torch.float32)],
        "encoder_backward": [
            (x, w_enc, b_enc, w_dec, words, window, mask, grad, torch.randn(k), torch.randn(k), one,
             signs, words,
             counts, n_rows, "rectangle", 0.5, n_bits, [True, True, True]),
            (x, w_enc, b_enc, w_dec, words, window[:0, 0], None, None, None, None, one, None, words,
             counts, n_rows, "sigmoid", 0.5, n_bits, [True, False, False]),
            (x, w_enc, b_enc, w_dec, words, window[:0, 0], None, grad, None, None, None, None, None,
             counts, n_rows, "identity", 0.0, n_bits, [False, True, True]),
        ],
    }[name]  # fmt: skip


def test_every_operator_of_the_contract_is_checked_here():
    for name in schemas.SCHEMAS:
        assert operator_arguments(name)
        assert "torch" in getattr(torch.ops.bae_fast, name).overloads()


OF_COLUMNS = ("encode", "covariance", "terms", "slopes")
# what decodes knows of the bits of a feature; the others see columns
OF_FEATURES = [name for name in schemas.SCHEMAS if name not in OF_COLUMNS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "n_bits"), [*((name, 1) for name in schemas.SCHEMAS), *((n, 3) for n in OF_FEATURES)]
)
def test_opcheck_passes_for_every_raw_operator(name, n_bits, backend):
    overload = getattr(getattr(torch.ops.bae_fast, name), backend)
    for arguments in operator_arguments(name, n_bits):
        torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(schemas.SCHEMAS))
def test_the_raw_operators_carry_no_gradient(name, backend):
    for arguments in operator_arguments(name):
        asking = [
            a.clone().requires_grad_()
            if isinstance(a, torch.Tensor) and a.dtype.is_floating_point
            else a
            for a in arguments
        ]
        results = getattr(getattr(torch.ops.bae_fast, name), backend)(*asking)
        for result in results if isinstance(results, (tuple, list)) else [results]:
            assert not result.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_operators_do_not_alias_their_arguments(backend):
    for name in schemas.SCHEMAS:
        for arguments in operator_arguments(name):
            given = {a.untyped_storage().data_ptr() for a in arguments if torch.is_tensor(a)} - {0}
            results = getattr(getattr(torch.ops.bae_fast, name), backend)(*arguments)
            for result in results if isinstance(results, (tuple, list)) else [results]:
                assert result.untyped_storage().data_ptr() not in given, name


# -- transforms that are refused ---------------------------------------------------------------


def test_vmap_over_the_layer_says_to_use_leading_dimensions():
    bae = module()
    with pytest.raises(NotImplementedError, match=r"no vmap: pass x with leading dimensions"):
        torch.func.vmap(lambda x: bae(x).recon)(torch.randn(3, N, D))


def test_vmap_over_decode_says_to_use_leading_dimensions():
    bae = module()
    code = bae.encode(torch.randn(N, D))
    with pytest.raises(NotImplementedError, match=r"no vmap: give the code leading dimensions"):
        torch.func.vmap(lambda w: bf.decode(code, w, bae.b_dec))(torch.randn(3, F, D))


@pytest.mark.parametrize("what", ["layer", "decode"])
def test_forward_mode_is_refused(what):
    bae, x = module(), torch.randn(N, D)
    if what == "layer":
        function, primal = (lambda x: bae(x).recon), x
    else:
        code = bae.encode(x)
        function, primal = (lambda w: bf.decode(code, w, bae.b_dec)), bae.W_dec.detach()
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(function, (primal,), (torch.randn_like(primal),))


@pytest.mark.parametrize("term", TERMS)
def test_a_second_backward_through_the_gradient_is_refused(term):
    bae, x = module(), torch.randn(N, D, requires_grad=True)
    loss = loss_of(bae, x, (term,))
    # times itself, so that the incoming gradient depends on the parameters too
    (grad,) = torch.autograd.grad(loss * loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("term", ["recon", "entropy", "covariance"])
def test_a_penalty_on_the_gradient_of_a_linear_loss_is_refused_and_no_constant(term):
    """No incoming gradient depends on anything, but the gradient does on x and the parameters."""
    bae, x = module(), torch.randn(N, D, requires_grad=True)
    out = bae(x, covariance=True)
    (grad,) = torch.autograd.grad(getattr(out, term).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        (bae.mse(out, x) + grad.square().sum()).backward()


def test_second_derivatives_are_refused_by_functional_transforms_too():
    bae, x = module(), torch.randn(N, D)

    def total(rows):
        return bae(rows, covariance=False).recon.sum()

    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.autograd.functional.hessian(total, x)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.func.grad(lambda rows: torch.func.grad(total)(rows).square().sum())(x)


def test_gradients_with_a_graph_equal_those_without_and_many_at_once():
    bae, x = module(), torch.randn(N, D, requires_grad=True)
    recon = bae(x).recon
    outer = torch.randn(3, *recon.shape)
    each = [torch.autograd.grad(recon, x, one, retain_graph=True)[0] for one in outer]
    for one, expected in zip(outer, each, strict=True):
        (grad,) = torch.autograd.grad(recon, x, one, create_graph=True)
        assert torch.equal(grad, expected)
    (many,) = torch.autograd.grad(recon, x, outer, is_grads_batched=True, create_graph=True)
    assert torch.equal(many, torch.stack(each))

    def rows_to_recon(rows):
        return bae(rows, covariance=False).recon

    jacobian = torch.func.jacrev(rows_to_recon)(x[:2].detach())
    assert torch.equal(jacobian, torch.autograd.functional.jacobian(rows_to_recon, x[:2].detach()))


def test_a_second_backward_through_decode_is_refused():
    bae = module()
    recon = bae.decode(bae.encode(torch.randn(N, D)))
    (grad,) = torch.autograd.grad(recon.square().sum(), bae.W_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_functional_gradients_equal_backward():
    bae, x = module(), torch.randn(N, D)
    parameters = {name: p.detach() for name, p in bae.named_parameters()}
    buffers = dict(bae.named_buffers())

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bae = bae

        def forward(self, x):
            return loss_of(self.bae, x)

    holder = Loss()
    named = {f"bae.{name}": t for name, t in {**parameters, **buffers}.items()}
    found = torch.func.grad(lambda p: torch.func.functional_call(holder, {**named, **p}, (x,)))(
        {f"bae.{name}": t for name, t in parameters.items()}
    )
    loss_of(bae, x).backward()
    for name, want in gradients(bae).items():
        assert torch.equal(found[f"bae.{name}"], want)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_functional_gradients_of_the_reference_and_of_activations_equal_backward(surrogate):
    width = None if surrogate in ("identity", "official") else 0.8
    bae = module(surrogate=surrogate, surrogate_width=width)
    dense = module(surrogate=surrogate, surrogate_width=width, impl="reference")
    dense.load_state_dict(bae.state_dict())
    weight = torch.randn(D)
    for function in (bae.activations, lambda x: dense(x).recon @ weight):
        x = torch.randn(N, D, requires_grad=True)
        function(x).square().sum().backward()
        found = torch.func.grad(lambda x, f=function: f(x).square().sum())(x.detach())
        assert float(x.grad.abs().sum()) > 0
        torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_the_layer_is_exported_for_any_number_of_rows(impl):
    layer = bf.BinaryAutoencoder(D, F, impl=impl).eval().as_layer()
    rows = {0: torch.export.Dim("n", min=2)}
    program = torch.export.export(layer, (torch.randn(N, D),), dynamic_shapes=(rows,)).module()
    x = torch.randn(N + 3, D)
    assert torch.equal(program(x), layer(x))


# -- shapes without numbers --------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_step_on_the_meta_device_has_the_shapes_of_one_on_the_cpu(impl):
    def step(device):
        bae = bf.BinaryAutoencoder(D, F, impl=impl, device=device)
        x = torch.zeros(3, N, D, device=device)
        out = bae(x, covariance=True)
        bae.loss(out, x, entropy_weight=0.1, covariance_weight=0.1).backward()
        code = bae.encode(x)
        tensors = [out.recon, out.entropy, out.covariance, out.code.words, bae.decode(code)]
        tensors += gradients(bae).values()
        assert {tensor.device.type for tensor in tensors} == {device}
        return [(tensor.shape, tensor.dtype) for tensor in tensors]

    assert step("meta") == step("cpu")


def test_a_module_made_in_a_device_context_is_on_it_and_can_be_filled():
    """As a large model is made: on the meta device, then given memory and weights."""
    with torch.device("meta"):
        bae = bf.BinaryAutoencoder(D, F)
        sae = make_baseline("jumprelu", D, F, k=4)
    for module in (bae, sae):
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    torch.manual_seed(3)
    bae.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(3)
    for name, parameter in bf.BinaryAutoencoder(D, F).named_parameters():
        assert torch.equal(bae.get_parameter(name), parameter)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_training_step_runs_on_fake_tensors(impl):
    with FakeTensorMode():
        bae = bf.BinaryAutoencoder(D, F, impl=impl).train()
        x = torch.zeros(N, D)
        bae.loss(bae(x), x, entropy_weight=0.1).backward()
        assert bae.W_enc.grad.shape == (D, F)


# -- gradcheck where the function is smooth ----------------------------------------------------


def test_gradcheck_of_the_decoder_whose_bits_do_not_move():
    bae = module().double()
    x = torch.randn(5, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w, b: bf.binary_autoencoder(x, bae.W_enc, bae.b_enc, w, b, impl="torch").recon,
        (bae.W_dec, bae.b_dec),
    )
    code = bae.encode(x)
    assert torch.autograd.gradcheck(
        lambda w, b: bf.decode(code, w, b, impl="torch"), (bae.W_dec, bae.b_dec)
    )


def test_gradcheck_of_the_declared_surrogate():
    """The layer's gradient is the slope of a smooth layer whose values equal the bits at the point
    and move as the surrogate says: dV/dpre = 4 s (1 - s)."""
    width = 0.5
    bae = module().double()
    x = torch.randn(4, D, dtype=torch.float64)
    weights = torch.randn(4, D, dtype=torch.float64)
    inputs = [t.detach().requires_grad_() for t in (x, bae.W_enc, bae.b_enc, bae.W_dec, bae.b_dec)]
    out = bf.binary_autoencoder(*inputs, surrogate="sigmoid", surrogate_width=width, impl="torch")
    found = torch.autograd.grad((out.recon * weights).sum(), inputs)

    point = [t.detach() for t in inputs]
    pre0 = point[0] @ point[1] + point[2]

    def stand_in(*moved):
        pre = moved[0] @ moved[1] + moved[2]
        soft = 4 * width * (torch.sigmoid(pre / width) - torch.sigmoid(pre0 / width))
        return ((((pre0 > 0).double() + soft) @ moved[3] + moved[4]) * weights).sum()

    step = 1e-6
    for index, grad in enumerate(found):
        direction = torch.randn_like(point[index])
        plus, minus = list(point), list(point)
        plus[index] = point[index] + step * direction
        minus[index] = point[index] - step * direction
        slope = (stand_in(*plus) - stand_in(*minus)) / (2 * step)
        assert torch.isclose((grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "surrogate", ["rectangle", pytest.param("sigmoid", marks=pytest.mark.long)]
)
def test_dynamic_shapes_and_several_widths_compile_in_one_process(surrogate):
    """Widths become symbolic once a second one is seen: their check must still be traced."""
    for width in (0.2, 0.3, 0.45):
        bae = bf.BinaryAutoencoder(6, 40, surrogate=surrogate, surrogate_width=width)
        compiled = torch.compile(bae, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (5, 8):
            x = torch.randn(n, 6)
            out = compiled(x)
            bae.mse(out, x).backward()
            assert out.code.equal(bae.encode(x))
