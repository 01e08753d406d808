from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from mpoc.errors import MpocError, UsageError
from mpoc.io.atomic import naming, refuse_existing, staged
from mpoc.io.safetensors_header import TensorInfo
from mpoc.io.safetensors_writer import Entry, plan_shards, replace_metadata, write_safetensors
from tests.support.checkpoints import contents, save_directory

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)
fast = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def entry(name: str, tensor: Tensor) -> Entry:
    info = TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return Entry(info, lambda: tensor)


@fast
@given(
    st.dictionaries(
        st.text("abcxyz.019_é漢", min_size=1, max_size=12),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=7,
    ),
    st.dictionaries(st.sampled_from(["format", "mpoc", "né"]), st.text(max_size=9), max_size=1),
)
def test_matches_the_library_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory,
    specs: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str],
) -> None:
    state = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in specs.items()}
    path = tmp_path_factory.mktemp("writer") / "m.safetensors"
    write_safetensors(path, [entry(name, tensor) for name, tensor in state.items()], metadata)
    # An empty metadata is no metadata to either; the library writes several keys in no fixed order.
    assert path.read_bytes() == save(state, metadata or None)


def test_writes_views_by_their_elements(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {"t": base.t(), "step": base[::2, 1::3], "wide": base[:1].expand(5, 8), "scalar": base[0, 0]}
    state["column"] = base[:, 3]
    write_safetensors(tmp_path / "m", [entry(name, tensor) for name, tensor in state.items()], {})
    loaded = load_file(tmp_path / "m")
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_reads_tensors_one_at_a_time_in_file_order(tmp_path: Path) -> None:
    order: list[str] = []

    def read(name: str) -> Tensor:
        order.append(name)
        return torch.zeros(2)

    entries = [Entry(TensorInfo(name, "float32", (2,)), lambda name=name: read(name)) for name in "cab"]  # type: ignore[misc]
    write_safetensors(tmp_path / "m", entries, {})
    assert order == ["a", "b", "c"]


def test_replaces_metadata_and_keeps_tensors(tmp_path: Path) -> None:
    state, path = {"a": torch.randn(3, 2), "b": torch.arange(5)}, tmp_path / "m.safetensors"
    save_file(state, path, {"mpoc": "old"})
    replace_metadata(path, {"mpoc": "new and longer"})
    assert path.read_bytes() == save(state, {"mpoc": "new and longer"})


def test_rejects_duplicate_names(tmp_path: Path) -> None:
    twice = [entry("a", torch.zeros(2)), entry("b", torch.zeros(2)), entry("a", torch.ones(3))]
    with pytest.raises(MpocError, match=r"m\.safetensors: two tensors would be named 'a'"):
        write_safetensors(tmp_path / "m.safetensors", twice, {})


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_rejects_tensors_that_contradict_the_header(tmp_path: Path, wrong: Tensor) -> None:
    lie = Entry(TensorInfo("a", "float32", (2,)), lambda: wrong)
    with pytest.raises(AssertionError, match="a: "):
        write_safetensors(tmp_path / "m", [lie], {})


@fast
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 100))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    entries = [
        Entry(TensorInfo(f"t{k}", "uint8", (size,)), lambda: torch.empty(0)) for k, size in enumerate(sizes)
    ]
    shards = plan_shards(entries, limit)
    assert [e for shard in shards for e in shard.entries] == entries
    totals = [sum(e.info.nbytes for e in shard.entries) for shard in shards]
    for total, shard in zip(totals, shards, strict=True):
        assert total <= limit or len(shard.entries) == 1
    for total, following in zip(totals[:-1], shards[1:], strict=True):
        assert total + following.entries[0].info.nbytes > limit  # no shard is closed early
    count = len(shards)
    names = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    assert [shard.name for shard in shards] == (names if count > 1 else ["model.safetensors"])


@pytest.mark.parametrize("name", ["out", "cores", "replaced", "new", "out.partial"])
@pytest.mark.parametrize("directory", [False, True])
def test_staging_leaves_only_the_output(tmp_path: Path, directory: bool, name: str) -> None:
    output = tmp_path / name
    for content in ("old", "new"):  # the second replaces the first
        with staged(output) as target:
            assert target.parent.parent == tmp_path  # beside the output: the same file system
            assert not output.exists() or content == "new"
            if directory:
                target.mkdir()
                (target / content).write_text(content)
            else:
                target.write_text(content)
        assert contents(tmp_path) == {f"{name}/{content}" if directory else name: content.encode()}
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("failure", [MpocError("no"), KeyboardInterrupt(), SystemExit(143), MemoryError()])
@pytest.mark.parametrize("directory", [False, True])
def test_failure_keeps_the_old_output(tmp_path: Path, directory: bool, failure: BaseException) -> None:
    output = tmp_path / "out"
    old = output / "file" if directory else output
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    before = contents(tmp_path)
    with pytest.raises(type(failure)), staged(output) as target:
        if directory:
            target.mkdir()
            (target / "file").write_text("half")
        else:
            target.write_text("half")
        raise failure
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_waits_for_the_final_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """And then says what became of it; with what it is made of gone."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        signal.raise_signal(signum)
        return replace(self, target)

    before = signal.signal(signum, stop)
    monkeypatch.setattr(Path, "replace", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt) as caught, staged(tmp_path / "out") as target:
            target.write_text("new")
        assert signal.getsignal(signum) is stop
    finally:
        signal.signal(signum, before)
    assert caught.value.__notes__ == [f"{tmp_path / 'out'} is written"]
    assert contents(tmp_path) == {"out": b"new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_failed_rename_restores_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "file").write_text("old")
    rename = Path.rename

    def fail_second(self: Path, target: Path) -> Path:
        if target == output and "replaced" not in self.name:
            raise OSError(errno.EIO, "broken", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    monkeypatch.setattr("mpoc.io.atomic._exchanged", lambda *_: False)  # as on systems without it
    with pytest.raises(OSError, match="broken"), staged(output) as target:
        target.mkdir()
        (target / "file").write_text("new")
    assert contents(tmp_path) == {"out/file": b"old"}
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("named", [None, "/source/tokenizer.json"])
def test_full_disk_names_the_output(tmp_path: Path, named: str | None) -> None:
    with pytest.raises(OSError, match="full") as caught, staged(tmp_path / "out.safetensors"):
        raise OSError(errno.ENOSPC, "full", named)
    assert caught.value.filename == str(tmp_path / "out.safetensors")
    assert contents(tmp_path) == {}


def test_other_errors_keep_their_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="denied") as caught, staged(tmp_path / "out.safetensors"):
        raise OSError(errno.EACCES, "denied", "/source/model.pt")
    assert caught.value.filename == "/source/model.pt"


class TestRefuseExisting:
    """Which outputs are refused before any work."""

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "m.pt").write_text("weights")
        (tmp_path / "old.safetensors").write_text("old")
        (tmp_path / "empty").mkdir()
        (tmp_path / "home" / "documents").mkdir(parents=True)
        (tmp_path / "home" / "config.json").write_text("{}")
        (tmp_path / "home" / "documents" / "thesis.txt").write_text("years")
        save_directory(tmp_path / "bert", {"a": torch.zeros(2)})
        save_directory(tmp_path / "bert-mpo", {"a": torch.zeros(2)})
        (tmp_path / "link.pt").symlink_to("m.pt")
        (tmp_path / "dangling").symlink_to("nowhere")
        os.mkfifo(tmp_path / "pipe")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("output", "source", "said"),
        [
            ("m.pt", "m.pt", "over or into the input"),
            ("link.pt", "m.pt", "over or into the input"),
            ("m.pt", "link.pt", "over or into the input"),
            ("bert", "bert", "over or into the input"),
            ("bert/out", "bert", "over or into the input"),
            ("bert/deep/out", "bert", "over or into the input"),
            ("bert", "bert/model.safetensors", "over or into the input"),
            (".", "m.pt", "not a name for an output"),
            ("..", "bert", "not a name for an output"),
            ("empty", "m.pt", "is a directory, and the output is a file"),
            ("bert-mpo", "m.pt", "is a directory, and the output is a file"),
            ("old.safetensors", "bert", "is a file, and the output is a directory"),
            ("home", "bert", "holds documents/thesis.txt, which no output of mpoc would"),
            ("pipe", "m.pt", "neither a file nor a directory"),
        ],
    )
    def test_never_writes_over_an_input_even_with_force(
        self, place: Path, output: str, source: str, said: str
    ) -> None:
        with pytest.raises(UsageError, match=said) as caught:
            refuse_existing(Path(output), Path(source), force=True)
        assert output in str(caught.value)
        assert "-o" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        ("output", "source"),
        [
            ("old.safetensors", "m.pt"),
            ("dangling", "m.pt"),
            ("empty", "bert"),
            ("bert-mpo", "bert"),
            ("bert/model.safetensors", "m.pt"),
        ],
    )
    def test_rejects_existing_output_without_force(self, place: Path, output: str, source: str) -> None:
        with pytest.raises(UsageError, match="exists already") as caught:
            refuse_existing(Path(output), Path(source), force=False)
        assert "--force" in (caught.value.hint or "")
        refuse_existing(Path(output), Path(source), force=True)

    @pytest.mark.parametrize(("output", "source"), [("new", "bert"), ("empty/new.safetensors", "m.pt")])
    def test_accepts_new_output(self, place: Path, output: str, source: str) -> None:
        refuse_existing(Path(output), Path(source), force=False)

    def test_reports_a_missing_parent(self, place: Path) -> None:
        with pytest.raises(MpocError, match="there is no directory") as caught:
            refuse_existing(Path("no/where/out"), Path("m.pt"), force=False)
        assert caught.value.hint == f"mkdir -p {place / 'no' / 'where'}"

    def test_reports_an_unwritable_parent(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(MpocError, match="no permission to write in") as caught:
            refuse_existing(Path("new"), Path("m.pt"), force=False)
        assert str(place) in str(caught.value)


def test_error_names_its_output(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, naming(tmp_path / "out"), naming(tmp_path / "moments"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "moments")
    with pytest.raises(OSError) as caught, naming(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "scratch"))
    assert caught.value.filename == str(tmp_path / "out")
