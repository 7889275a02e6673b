"""An autoencoder that is neither of the package's: what a user may write against the contract."""

from torch import Tensor, nn

from bae_fast.autoencoder import Autoencoder, AutoencoderConfig, register_architecture


@register_architecture("test_toy")
class Toy(Autoencoder):
    """Softplus features, an L1 penalty, a decoder that is a Linear."""

    def __init__(self, d_in: int, d_sae: int, device: str | None = None) -> None:
        super().__init__()
        self.config = AutoencoderConfig(d_in, d_sae, d_in, {"hook_name": "here"})
        self.config.check("Toy")
        self.encoder = nn.Linear(d_in, d_sae, device=device)
        self.decoder = nn.Linear(d_sae, d_in, device=device)
        self.register_normalization(d_in, None, device=device)

    def encode(self, x: Tensor) -> Tensor:
        return (self.encoder(self.normalize(x)) - 0.3).relu()

    def decode(self, code: Tensor) -> Tensor:
        return self.denormalize(self.decoder(code))

    def training_loss(self, x, target, *, dead, done):
        features = self.encode(x)
        mse = (self.normalize(x) - self.decoder(features)).square().mean()
        return mse + 1e-3 * features.mean(), {"mse": mse}, (features > 0).sum(0)

    def before_update(self) -> None:
        pass

    def after_update(self) -> None:
        pass

    def finish(self, x: Tensor) -> None:
        pass

    @classmethod
    def from_config(cls, values, source):
        config = AutoencoderConfig(
            values["d_in"], values["d_sae"], values["d_out"], values["metadata"]
        )
        config.check(source)
        made = cls(config.d_in, config.d_sae, device="meta")
        made.config = config
        return made
