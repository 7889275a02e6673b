"""Put a trained autoencoder inside its language model, and set one of its features by hand.

python examples/splice_and_steer.py my_bae --feature 17 --strength 8 --prompt "The list holds"
"""

import argparse

import bae_fast as bf
from bae_fast.causal import spliced
from bae_fast.lm import DEFAULT_MODEL, load_language_model


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bae", help="The folder of a trained model.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="The Hugging Face id, or a folder.")
    parser.add_argument("--hook", default="model.layers.11")
    parser.add_argument("--feature", type=int, default=0)
    parser.add_argument("--strength", type=float, default=8.0, help="1 is the feature's own value.")
    parser.add_argument("--prompt", default="The list holds")
    parser.add_argument("--tokens", type=int, default=20, help="The number of new tokens.")
    options = parser.parse_args(arguments)

    lm = load_language_model(options.model)
    bae = bf.BinaryAutoencoder.from_pretrained(options.bae)
    prompt = lm.tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)

    def text():
        ids = lm.model.generate(**prompt, max_new_tokens=options.tokens, do_sample=False)
        return lm.tokenizer.decode(ids[0])

    def steer(features):  # [tokens, F], a copy
        features[:, options.feature] = options.strength
        return features

    said = {"the model": text()}
    with spliced(lm, options.hook, bae, add_error=True):
        said["spliced, error added back"] = text()
    with spliced(lm, options.hook, bae):
        said["the reconstruction in the state's place"] = text()
    with spliced(lm, options.hook, bae, steer, add_error=True):
        said[f"feature {options.feature} at {options.strength:g}"] = text()
    for name, words in said.items():
        print(f"{name}: {words}")
    return said


if __name__ == "__main__":
    main()
