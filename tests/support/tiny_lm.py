"""A random language model of two blocks with one token a word, and an autoencoder that is none."""

from pathlib import Path

import torch


class Same:
    """An autoencoder that is the identity."""

    def encode(self, x):
        return x

    def decode(self, features):
        return features


def save_tiny_model(folder: Path, words: list[str]) -> Path:
    """A Llama 16 wide; other words are [UNK]."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def save_tiny_study(folder: Path, words: list[str]):
    """A tiny language model ``lm``, a text of its words but for the first two, and a ``bae`` of
    its states; their metadata and the states."""
    from bae_fast import BinaryAutoencoder
    from bae_fast.lm import harvest, load_language_model, windows

    name = str(save_tiny_model(folder / "lm", words))
    order = torch.randint(2, len(words), (6000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(words[i] for i in order))
    metadata = {"model_name": name, "hook_name": "model.layers.0", "context_size": 16}
    lm = load_language_model(name)
    text = windows(lm.tokenizer, (folder / "text.txt").read_text(), 16)
    x = harvest(lm, text, "model.layers.0", folder=folder / "cache", progress=False).rows.float()
    torch.manual_seed(0)
    bae = BinaryAutoencoder(16, 32, metadata=metadata).fit_normalization_(x)
    bae.init_density_(x, 0.1).save_pretrained(folder / "bae")
    return metadata, x


class LetterTokenizer:
    """One token a character, 2 to 41; 0 ends documents."""

    eos_token_id = 0
    all_special_ids = (0,)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [2 + ord(letter) % 40 for letter in text]}


class PlacesModel(torch.nn.Module):
    """A model without transformers, whose states tell which token they are of.

    Module ``first`` gives the token's embedding, ``second`` the running sum of them in a window.
    """

    def __init__(self, vocabulary: int = 42, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Embedding(vocabulary, width)
        self.second = Summed()
        self._calls = 0

    @property
    def calls(self):
        return self._calls

    def get_input_embeddings(self):
        return self.first

    def forward(self, input_ids, use_cache=False):
        self._calls += 1
        return self.second(self.first(input_ids))


class Summed(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, x.cumsum(1)], dim=2)


def places_lm(seed: int = 0, **options):
    """A language model whose states are known: `PlacesModel` with letters as tokens."""
    from bae_fast.lm import LanguageModel

    model = PlacesModel(seed=seed, **options).eval().requires_grad_(False)
    width = model.first.weight.shape[1]
    return LanguageModel(model, LetterTokenizer(), "places", "Places", torch.float32, width)
