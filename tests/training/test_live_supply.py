"""Rows while the model runs: the same ones whoever waits for whom, resumed to the bit."""

import threading

import pytest
import torch
from tiny_lm import LetterTokenizer, places_lm

from bae_fast.lm import TextFiles, TextWindows, TokenWindows
from bae_fast.training import LiveSupply, Supply, merge_states

CONTEXT = 17


@pytest.fixture
def supplies():
    """Makes supplies whose model runs in a thread, and closes them at the end."""
    made = []

    def make(text=None, lm=None, **options):
        settings = {"buffer_rows": 256, "batch_size": 2, "streams": 4, "seed": 3, "ahead": 2}
        settings |= options
        made.append(
            LiveSupply(lm or places_lm(), text or windows(), ["first", "second"], **settings)
        )
        return made[-1]

    yield make
    for supply in made:
        supply.close()
    assert not [t for t in threading.enumerate() if t.name == "live-supply"]


def windows(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TokenWindows(torch.randint(1, 42, (n, CONTEXT), generator=generator))


def taken(supply, n, times):
    return torch.stack([supply.next(n).ids for _ in range(times)])


def place(ids, batch_size, n_windows):
    """(window, position) of numbers of rows, where every pass but the text's last is full."""
    passes = -(-n_windows // batch_size)
    number, inside = ids // (batch_size * CONTEXT), ids % (batch_size * CONTEXT)
    return number % passes * batch_size + inside // CONTEXT, inside % CONTEXT


def test_rows_are_the_models_states_of_the_text(supplies):
    lm = places_lm()
    supply = supplies(lm=lm, max_norm_ratio=float("inf"))
    assert isinstance(supply, Supply)
    assert supply.widths == {"first": 4, "second": 8}
    first = lm.model.first(windows().tokens)
    want = torch.cat([first, first.cumsum(1)], dim=2)
    for _ in range(60):
        batch = supply.next(64)
        window, position = place(batch.ids, 2, 60)
        assert torch.equal(batch.x["first"], first[window, position])
        assert torch.equal(batch.x["second"], want[window, position])
        assert int(position.min()) >= 1


def test_every_row_is_given_out_once_a_pass_of_the_text(supplies):
    """Rows go in once a pass of the text, and none is given out twice."""
    supply = supplies(max_norm_ratio=float("inf"))
    ids = taken(supply, 64, 75).flatten()  # five times the text's 960 rows
    assert len(ids.unique()) == len(ids)
    # of passes well before the last one, all rows are out or in the buffers
    number = ids // (2 * CONTEXT)
    early = int(number.max()) - 16
    out = int((number < early).sum())
    assert early * 2 * (CONTEXT - 1) - 256 <= out <= early * 2 * (CONTEXT - 1)


@pytest.mark.parametrize("ahead", [0, 2])
def test_world_sizes_see_the_same_batches_and_go_on_from_each_other(supplies, tmp_path, ahead):
    n, parts = 64, (4, 1, 2)
    want = taken(supplies(), n, 30)
    got, state = [], None
    for world in parts:
        ranks = [supplies(rank=rank, world=world, ahead=ahead) for rank in range(world)]
        for supply in ranks:
            if state is not None:
                supply.load_state_dict(state)
        got += [torch.cat([supply.next(n).ids for supply in ranks]) for _ in range(10)]
        torch.save(merge_states([supply.state_dict() for supply in ranks]), tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
    assert int((torch.stack(got) != want).sum()) == 0


@pytest.mark.parametrize("done", [0, 1, 13, 40])
@pytest.mark.parametrize(("ahead", "later"), [(2, 2), (0, 0), (0, 2), (2, 0)])
def test_a_state_brings_the_same_rows_back_to_the_bit(supplies, done, ahead, later):
    supply = supplies(ahead=ahead)
    for _ in range(done):
        supply.next(64)
    state = supply.state_dict()
    other = supplies(ahead=later)
    other.next(64)
    other.load_state_dict(state)
    for _ in range(20):
        one, two = supply.next(64), other.next(64)
        assert torch.equal(one.ids, two.ids)
        assert all(torch.equal(x, two.x[hook]) for hook, x in one.x.items())


def test_a_text_of_documents_goes_on_where_it_was(supplies, tmp_path):
    letters = torch.randint(97, 122, (9, 300), generator=torch.Generator().manual_seed(0))
    for i, codes in enumerate(letters.tolist()):
        (tmp_path / f"{i}.txt").write_text("".join(map(chr, codes)))

    def text():
        return TextWindows(LetterTokenizer(), TextFiles(tmp_path), CONTEXT)

    supply = supplies(text())
    taken(supply, 64, 7)
    state, want = supply.state_dict(), taken(supply, 64, 70)
    other = supplies(text())
    other.load_state_dict(state)
    assert torch.equal(taken(other, 64, 70), want)


def test_a_changed_text_is_noticed_when_a_state_is_loaded(supplies):
    supply = supplies()
    taken(supply, 64, 5)
    with pytest.raises(ValueError, match="state must be of the same rows; it is of text"):
        supplies(windows(seed=1)).load_state_dict(supply.state_dict())


def test_on_a_cpu_the_model_runs_when_rows_are_asked_for(supplies):
    lm = places_lm()
    supply = supplies(lm=lm, ahead=None, max_norm_ratio=float("inf"))  # no passes are kept aside
    supply.next(64)
    assert not [t for t in threading.enumerate() if t.name == "live-supply"]
    before = lm.model.calls
    with supply.pause():  # takes nothing away from the caller
        taken(supply, 64, 10)
    assert lm.model.calls > before
    assert not lm.model.second._forward_hooks
    assert supplies(ahead=None, threads=1).ahead == 2  # cores are left to the trainer


def test_an_error_of_the_model_has_its_cause_and_the_same_rows_come_after_it(supplies):
    lm = places_lm()
    supply, want = supplies(lm=lm, ahead=0), supplies()
    assert torch.equal(taken(supply, 64, 2), taken(want, 64, 2))

    def fail(*_):
        raise error

    for error in (FloatingPointError("the card is gone"), KeyboardInterrupt()):
        handle = lm.model.second.register_forward_pre_hook(fail)
        with pytest.raises((RuntimeError, KeyboardInterrupt)) as raised:
            taken(supply, 64, 50)
        if isinstance(error, Exception):
            assert str(raised.value) == "supply: the language model failed: the card is gone"
            assert raised.value.__cause__ is error
        handle.remove()
        # batches before the failed one were given out: the next are found by their numbers
        got, seen = supply.next(64).ids, want.next(64).ids
        while not torch.equal(got, seen):
            seen = want.next(64).ids
        assert torch.equal(taken(supply, 64, 9), taken(want, 64, 9))


def test_the_model_runs_while_the_caller_works(supplies):
    """The thread finishes a pass while no one asks for rows."""
    lm = places_lm()
    supply = supplies(lm=lm, max_norm_ratio=float("inf"))  # no passes are kept for the limits
    supply.next(64)
    ran = threading.Event()
    handle = lm.model.second.register_forward_pre_hook(lambda *_: ran.set())
    supply.next(64)
    ran.clear()
    supply._credits.release()  # room for one more
    assert ran.wait(60)
    handle.remove()


def test_the_thread_works_ahead_for_every_stream(supplies):
    """The streams' passes come due together; the trainer must not wait for all but the first."""
    lm, ran = places_lm(), threading.Semaphore(0)
    supply = supplies(lm=lm, buffer_rows=64, ahead=1, max_norm_ratio=float("inf"))
    supply.sample(1, 0)
    handle = lm.model.second.register_forward_pre_hook(lambda *_: ran.release())
    supply.next(4)
    for _ in range(4 + 1 + 4):  # the first of every stream, one ahead, and one for every stream
        assert ran.acquire(timeout=10)
    handle.remove()


def test_the_thread_stops_where_nobody_takes_rows(supplies):
    lm = places_lm()
    supply = supplies(lm=lm, buffer_rows=64, ahead=3, max_norm_ratio=float("inf"))
    supply.sample(1, 0)  # the limits are known: no passes are kept aside for them
    most = 0
    before = lm.model.calls
    for i in range(1, 30):
        supply.next(32)
        # a pass has 32 rows: taken and buffered ones, what may wait, one in hand; streams drift
        most = max(most, lm.model.calls - before - (i * 32 + 64) // 32)
    assert 0 < most <= supply._granted + 1 + 8


def test_a_pause_waits_for_the_pass_in_hand_and_nothing_runs_within(supplies):
    lm = places_lm()
    supply = supplies(lm=lm)
    inside, go = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        go.wait(60)

    handle = lm.model.second.register_forward_pre_hook(hold)
    step = threading.Thread(target=supply.next, args=(64,))
    step.start()
    assert inside.wait(60)
    paused = threading.Event()

    def pause():
        with supply.pause():
            paused.set()
            seen.append(lm.model.calls)
            seen.append(lm.model(windows().tokens[:1]).shape)

    seen = []
    other = threading.Thread(target=pause)
    other.start()
    assert not paused.wait(0.1)  # the pass is in hand
    go.set()
    other.join(60)
    step.join(60)
    handle.remove()
    assert paused.is_set()
    assert seen[1] == (1, CONTEXT, 8)


def test_an_error_in_the_thread_reaches_the_caller_with_its_cause(supplies):
    lm = places_lm()
    supply = supplies(lm=lm)
    supply.next(64)

    def fail(*_):
        raise FloatingPointError("the card is gone")

    lm.model.second.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="thread ended: the card is gone") as raised:
        taken(supply, 64, 50)
    assert isinstance(raised.value.__cause__, FloatingPointError)
    with pytest.raises(RuntimeError, match="thread ended: the card is gone"):
        taken(supply, 64, 50)


def test_samples_and_heldout_rows_move_nothing(supplies):
    supply, plain = supplies(n_heldout=5), supplies(n_heldout=5)
    taken(supply, 64, 3)
    held = list(supply.heldout())
    ids = torch.cat([part.ids for part in held])
    assert int(ids.max()) < 0
    assert len(ids) == len(ids.unique()) <= 5 * (CONTEXT - 1)
    first = supply.capture.lm.model.first(windows().tokens[:5]).flatten(0, 1)
    assert torch.equal(torch.cat([part.x["first"] for part in held]), first[ids])
    sample = supply.sample(100, 1)
    assert torch.equal(sample.ids, plain.sample(100, 1).ids)
    assert len(sample.ids.unique()) == len(sample.ids) == 100
    taken(plain, 64, 3)
    assert torch.equal(taken(supply, 64, 10), taken(plain, 64, 10))
    assert list(supplies().heldout()) == []


@pytest.mark.parametrize("by", ["close", "block"])
def test_after_close_nothing_is_given_out(supplies, by):
    supply = supplies()
    supply.next(64)
    if by == "close":
        supply.close()
        supply.close()
    else:
        with supply as same:
            assert same is supply
    with pytest.raises(ValueError, match="supply must be open"):
        supply.next(64)
    assert not supply.capture.lm.model.second._forward_hooks


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"buffer_rows": 3}, "buffer_rows must be an int >= 4; got 3"),
        ({"batch_size": 0}, "batch_size must be an int >= 1; got 0"),
        ({"ahead": -1}, "ahead must be an int >= 0; got -1"),
        ({"n_heldout": 60}, "text must have a window behind the 60 that are held out"),
        ({"drop_positions": CONTEXT}, f"drop_positions must be below context_size={CONTEXT}"),
        ({"world": 3}, "world must divide the number of streams, 4"),
    ],
)
def test_what_is_not_allowed_is_said(supplies, options, text):
    with pytest.raises(ValueError, match=text):
        supplies(**options)
    with pytest.raises(
        ValueError, match="n, the rows of a batch, must be at most 256 by buffer_rows=256; got 260"
    ):
        supplies().next(260)
