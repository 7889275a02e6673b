"""Text that the package datasets streams, from local files: every token once, read on, harvested.

Runs where datasets is installed; tests/lm/test_documents.py has a stand-in for everywhere else.
"""

import json

import pytest
import torch
from tiny_lm import LetterTokenizer, places_lm

from bae_fast.lm import DatasetText, TextFiles, TextWindows, harvest_shards
from bae_fast.training import LiveSupply

datasets = pytest.importorskip("datasets")

N_FILES, N_DOCUMENTS = 3, 5
TEXTS = [
    chr(97 + file) * (1 + 7 * number % 23)
    for file in range(N_FILES)
    for number in range(N_DOCUMENTS)
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    folder = tmp_path / "files"
    folder.mkdir()
    for file in range(N_FILES):
        some = TEXTS[file * N_DOCUMENTS :][:N_DOCUMENTS]
        lines = "".join(json.dumps({"body": text}) + "\n" for text in some)
        (folder / f"{file}.jsonl").write_text(lines)
    return folder


def streamed(folder):
    data = datasets.load_dataset(str(folder), split="train", streaming=True)
    return DatasetText(data, field="body", name="files")


def test_windows_are_those_of_the_files_and_go_on_from_every_place(files):
    tokenizer = LetterTokenizer()
    want = TextWindows(tokenizer, TextFiles(files, field="body"), 7).read(1000)
    assert len(want) > 10
    text, states = TextWindows(tokenizer, streamed(files), 7), []
    for start in range(0, len(want) + 1, 2):
        states.append(json.loads(json.dumps(text.state_dict())))
        assert torch.equal(text.read(2), want[start : start + 2])
    for i, state in enumerate(states):
        other = TextWindows(tokenizer, streamed(files), 7)
        other.read(3)
        other.load_state_dict(state)
        assert torch.equal(other.read(1000), want[2 * i :])


def test_a_harvest_of_a_streamed_dataset_is_that_of_its_files(files, tmp_path):
    lm = places_lm()
    rows = []
    for name, documents in (
        ("streamed", streamed(files)),
        ("files", TextFiles(files, field="body")),
    ):
        text = TextWindows(lm.tokenizer, documents, 7)
        cache = harvest_shards(
            lm, text, ["first"], tmp_path / name, shard_windows=4, progress=False,
            max_norm_ratio=float("inf"),
        )  # fmt: skip
        blocks = [cache.read_block(i)["first"] for i in range(cache.n_blocks)]
        rows.append(torch.cat(blocks))
    assert len(rows[0]) > 50
    assert torch.equal(*rows)


def test_training_while_a_dataset_is_streamed_goes_on_where_it_was(files):
    def supply():
        lm = places_lm()
        text = TextWindows(lm.tokenizer, streamed(files), 7)
        return LiveSupply(
            lm, text, ["first"], buffer_rows=16, streams=2, batch_size=1, n_heldout=1,
            max_norm_ratio=float("inf"),
        )  # fmt: skip

    whole, cut = supply(), supply()
    try:
        before = [whole.next(4) for _ in range(8)]
        for batch in before[:3]:
            assert torch.equal(cut.next(4).ids, batch.ids)
        state = cut.state_dict()
    finally:
        whole.close()
        cut.close()
    again = supply()
    try:
        again.load_state_dict(state)
        for batch in before[3:]:
            found = again.next(4)
            assert torch.equal(found.ids, batch.ids)
            assert torch.equal(found.x["first"], batch.x["first"])
    finally:
        again.close()
