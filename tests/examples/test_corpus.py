from pathlib import Path

import pytest
import torch

from corpus import Corpus, CorpusError, load_corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for number in range(64):
        path = tmp_path / f"package_{number % 4}" / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"number = {number}\n" * 20)
    return tmp_path


def read(root: Path) -> Corpus:
    return load_corpus(root, minimum_bytes=100, block_bytes=256)


def test_standard_library_is_split_into_training_and_validation_text() -> None:
    corpus = load_corpus()
    assert 0.03 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.12
    assert corpus.train.dtype == corpus.validation.dtype == torch.uint8
    assert corpus.sha256 == load_corpus().sha256


def test_held_out_text_is_spread_over_the_corpus(tmp_path: Path) -> None:
    text = "".join(f"line_{number:04d}\n" for number in range(4096))
    (tmp_path / "module.py").write_text(text)
    corpus = read(tmp_path)
    validation = bytes(corpus.validation)
    assert len(corpus.train) + len(validation) == len(text)
    blocks = [validation[start : start + 256] for start in range(0, len(validation), 256)]
    positions = [text.encode().index(block) for block in blocks]
    assert positions == list(range(8 * 256, len(text), 16 * 256))
    assert not any(block in bytes(corpus.train) for block in blocks)


def test_third_party_and_other_files_are_left_out(library: Path) -> None:
    before = read(library)
    for name in ("site-packages/other.py", "package_0/dist-packages/other.py", "package_0/data.txt"):
        path = library / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("other = True\n")
    (library / "dangling.py").symlink_to("nowhere.py")
    assert read(library).sha256 == before.sha256


def test_no_text_is_an_error_that_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=f"{tmp_path} holds 0 bytes"):
        load_corpus(tmp_path)


def test_training_batch_depends_on_seed_and_step_alone(library: Path) -> None:
    corpus = read(library)
    inputs, targets = corpus.train_batch(4, 16, seed=1, step=2)
    torch.manual_seed(3)
    again, _ = read(library).train_batch(4, 16, seed=1, step=2)
    assert inputs.shape == targets.shape == (4, 16) and inputs.dtype == torch.int64
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for seed, step in ((1, 3), (2, 2), (1 + 2**32, 2)):
        assert not torch.equal(inputs, corpus.train_batch(4, 16, seed=seed, step=step)[0])


def test_validation_windows_spread_over_the_whole_text_without_overlap(library: Path) -> None:
    corpus = read(library)
    batches = list(corpus.validation_batches(1000, 4, 16))
    assert 1 <= len(batches) <= len(corpus.validation) // (4 * 16)
    inputs = torch.cat([inputs for inputs, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    assert torch.equal(inputs[0], corpus.validation[:16].long())
    assert torch.equal(targets[-1], corpus.validation[-16:].long())
    assert inputs.numel() <= len(corpus.validation)
