"""From a language model and a text to rows, and from rows to features with their contexts.

python examples/model_to_features.py --model Qwen/Qwen2.5-0.5B --hook model.layers.11 --text a.txt
"""

import argparse
import dataclasses

import bae_fast as bf
from bae_fast.analysis import choose_features, describe_features, evaluate, format_feature
from bae_fast.lm import (
    DEFAULT_MODEL,
    harvest,
    load_language_model,
    read_text,
    standard_library_text,
    windows,
)
from bae_fast.training import PRESETS, Trainer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="The Hugging Face id, or a folder.")
    parser.add_argument("--hook", default="model.layers.11", help="After block 12, as 0 counts.")
    parser.add_argument(
        "--text", help="A text file or a folder of them. Without it: Python's documentation."
    )
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument(
        "--context", type=int, default=256, help="The number of tokens in a window."
    )
    parser.add_argument("--heldout", type=int, default=4096, help="The number of rows held out.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cache", help="The folder of harvests. Without it: the user's cache.")
    parser.add_argument("--out", default="my_bae", help="The folder of the trained model.")
    options = parser.parse_args(arguments)

    lm = load_language_model(options.model)
    text = read_text(options.text) if options.text else standard_library_text()
    tokens = windows(lm.tokenizer, text, options.context, n_tokens=options.tokens)
    cache = harvest(lm, tokens, options.hook, folder=options.cache)
    print(cache.dropped_rows())
    split = cache.split(options.heldout)
    train = cache.rows[split.train.start : split.train.stop]
    heldout = cache.rows[split.heldout.start : split.heldout.stop]

    where = {"model_name": lm.name, "hook_name": options.hook, "context_size": options.context}
    bae = bf.BinaryAutoencoder(cache.d_in, 4 * cache.d_in, metadata=where)
    bae.fit_normalization_(train)
    config = dataclasses.replace(PRESETS["sparse"], steps=options.steps)
    Trainer(bae, train, config).fit(progress=True)
    bae.save_pretrained(options.out)

    found = evaluate(bae, heldout)
    print(f"FVU {found.fvu:.3f}, {found.bits:.1f} bits a row, {found.l0:.1f} features on in a row")
    chosen = choose_features(found.density, 5)
    features = describe_features(found.code, cache, split.heldout, chosen, lm.tokenizer)
    for feature in features:
        print(format_feature(feature))
    return found, features


if __name__ == "__main__":
    main()
