"""Models by their name on the Hugging Face hub: brought into its cache, and opened there as folders.

Cache, token, endpoint and offline mode are those of `huggingface_hub` (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`,
`HF_HUB_OFFLINE`), which is imported only when a name is given. Only safetensors and texts are downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_cli.errors import InputNotFoundError, LdmError, UnavailableError, amount, first_line
from ldm_cli.formats.hub_files import components_of, files_of
from ldm_cli.formats.json_file import read_json
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.inputs import read_input
from ldm_cli.reporting import Progress, Reporter
from ldm_cli.storage import TEMPORARY_PREFIX, expect_room, storage_errors, user_cache

# `runs` and `data` are the folders that recipes write to and read from; a file of weights is no name either.
_NAME = re.compile(
    r"(?!(?:data|runs)/|.*\.(?:safetensors|ckpt)(?:/|$))([A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@([\w/-][\w./-]*))?", re.ASCII
)
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRANSPORTS = ("httpx", "httpx2", "requests", "urllib3")


@dataclass(frozen=True)
class HubName:
    """`org/name`, at a branch, tag or commit."""

    repo: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """The name in `org/name[@revision]`; None if the text has another form.

        >>> HubName.parse("org/name@v1"), HubName.parse("runs/demo"), HubName.parse("a/b/c")
        (HubName(repo='org/name', revision='v1'), None, None)
        """
        found = _NAME.fullmatch(text)
        return None if found is None else cls(found[1], found[2] or "main")

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class _Listing:
    """The files of a model at one commit: its snapshot in the cache, bytes by name, and whether the hub says so."""

    snapshot: Path
    sizes: dict[str, int]
    is_online: bool


def hub_name(text: str, reporter: Reporter) -> HubName | None:
    """The name of the hub's model that `text` means; None if it means a path.

    A folder or file of that name wins, and so does a path in a folder or file `org` that does not exist.
    """
    name = HubName.parse(text)
    if name is None or os.path.lexists(text):
        if name is not None and "@" not in text and _repo_folder(name.repo).is_dir():
            reporter.info(f"'{text}' is the folder of that name; the model of the hub is '{text}@main'")
        return None
    parent = Path(text).parent
    if "@" not in text and parent.exists():
        if parent.is_dir():
            reporter.info(f"'{text}' means a path, as there is a folder '{parent}'; on the hub: '{text}@main'")
        return None
    return name


def model_path(text: str, components: Sequence[str], variant: str | None, reporter: Reporter) -> Path:
    """The path that `text` means; for a name of the hub the folder of `fetch`, with its arguments and errors."""
    name = hub_name(text, reporter)
    return Path(text) if name is None else fetch(name, components, variant, reporter)


def fetch(name: HubName, components: Sequence[str], variant: str | None, reporter: Reporter) -> Path:
    """The folder of a model, all of whose files are there once this returns.

    What the cache lacks is downloaded, after a line that says how much. A connection that breaks is taken up again at
    the last part (10 MB) that had arrived. After a failure, the next call downloads the files that are missing, each
    from its beginning. Without a connection, the cache alone is used.

    Args:
        name: of the model; a branch is resolved to its commit here, once.
        components: those needed, if it is a pipeline; empty: all. `tokenizer` alone needs no weights.
        variant: `fp16` or `bf16`, for weights in that precision; None: full precision, where there is one.
        reporter: receives messages and the progress.

    Raises:
        InputNotFoundError: there is no such model, revision, component or variant.
        UnavailableError: the hub cannot be reached, refuses access, or ends a download early.
        CheckpointError: the weights are pickles.
        OutputError, StorageError: the cache cannot be written, or is full.
    """
    with _hub_errors(name):
        listing = _ask(name, reporter)
        snapshot, sizes = listing.snapshot, listing.sizes
        if listing.is_online:
            _download(name, listing, [INDEX_NAME] if INDEX_NAME in sizes else [], reporter)
        if INDEX_NAME in sizes:
            needed = components_of(read_json(snapshot / INDEX_NAME), components, name.repo)
        else:
            needed = [*components, ""][:1]
        files = files_of(sizes, needed, variant, name.repo, reporter.info)
        if listing.is_online:
            _download(name, listing, files, reporter)
    return snapshot if variant is None else _only(snapshot, files, variant)


def hub_source(folder: Path) -> HubName | None:
    """The model and the commit whose folder in the cache this is, or a part of it; None for all other folders."""
    found = _SNAPSHOT.search(folder.as_posix())
    return None if found is None else HubName(f"{found[1]}/{found[2]}", found[3])


def recorded(folder: Path) -> str:
    """What a later command is to be given for a model: its `hub_source`, else the path."""
    return str(hub_source(folder) or folder)


def _repo_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")


def _ask(name: HubName, reporter: Reporter) -> _Listing:
    """The files of the model as the hub lists them; those in the cache if it cannot be reached."""
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    except Exception as error:
        cached = _cached(name)
        if cached is None or not _is_unreachable(error):
            raise
        reporter.info(f"'{name}' is taken from the cache: {_why_unreachable(error)}")
        return cached
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    return _Listing(_repo_folder(name.repo) / "snapshots" / info.sha, sizes, is_online=True)


def _cached(name: HubName) -> _Listing | None:
    commit = name.revision if _COMMIT.fullmatch(name.revision) else _known_commit(name)
    snapshot = _repo_folder(name.repo) / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        return None
    files = [file for file in snapshot.rglob("*") if file.is_file()]
    sizes = {file.relative_to(snapshot).as_posix(): file.stat().st_size for file in files}
    return _Listing(snapshot, sizes, is_online=False)


def _known_commit(name: HubName) -> str:
    """The commit of a branch when it was last downloaded; empty if it never was."""
    file = _repo_folder(name.repo) / "refs" / name.revision
    return read_input(file).decode("utf-8", "replace").strip() if file.is_file() else ""


def _download(name: HubName, listing: _Listing, files: Sequence[str], reporter: Reporter) -> None:
    """Bring the files of a commit that are not there into the cache."""
    from huggingface_hub import hf_hub_download

    snapshot, commit = listing.snapshot, listing.snapshot.name
    missing = [file for file in files if not (snapshot / file).is_file()]
    if not missing:
        return
    total = sum(listing.sizes[file] for file in missing)
    cache = snapshot.parents[2]
    with storage_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    expect_room(cache, total, f"'{name}'", ", set HF_HOME to another disk, and run the same command again")
    if total >= 2**20:
        reporter.info(f"downloading {len(missing)} files of '{name}' from the hub: {amount(total)}")
    # The library notes the commit of a branch where a file is asked for by the branch.
    revision = commit if commit in (name.revision, _known_commit(name)) else name.revision
    with reporter.progress(f"downloading '{name}'", total >> 20, unit="MiB") as progress, storage_errors(cache):
        bar = _bar(progress)
        for file in missing:
            with _hub_errors(name):
                hf_hub_download(name.repo, file, revision=revision, tqdm_class=bar)
            revision = commit
    if absent := [file for file in missing if not (snapshot / file).is_file()]:
        raise UnavailableError(f"'{name}' lacks '{absent[0]}'", "the branch moved meanwhile", "run the command again")


def _bar(progress: Progress) -> Any:
    """A class of progress bars that show nothing, and report the bytes of all of them to ours."""
    from huggingface_hub.utils.tqdm import tqdm

    done = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            done += int(n or 0)
            progress.update(done >> 20)

    return Bar


def _only(snapshot: Path, files: Sequence[str], variant: str) -> Path:
    """A folder of links to these files: a reader of the snapshot would prefer weights in full precision."""
    folder = user_cache() / "variants" / variant / Path(*snapshot.parts[-3:])
    for file in files:
        link = folder / file
        temporary = link.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{link.name}")
        with storage_errors(folder):
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(snapshot / file)
            temporary.replace(link)
    return folder


@contextmanager
def _hub_errors(name: HubName) -> Iterator[None]:
    """Turn the errors of `huggingface_hub` into ours; failures of the disk pass."""
    try:
        yield
    except LdmError:
        raise
    except Exception as error:
        known = _as_ldm_error(error, name)
        if known is None:
            raise
        raise known from error


def _as_ldm_error(error: BaseException, name: HubName) -> LdmError | None:
    from huggingface_hub import errors

    what = f"cannot get '{name}' from the hub"
    if isinstance(error, errors.GatedRepoError):
        remedy = "ask for access on its page, and set HF_TOKEN"
        return UnavailableError(what, "its owner grants access on request", remedy)
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        cause = "there is no such folder, and the hub has no such model or keeps it private"
        return InputNotFoundError(f"no model '{name.repo}'", cause, "check the name; for a private model, set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputNotFoundError(f"'{name.repo}' has no revision '{name.revision}'")
    if _is_unreachable(error):
        cause = f"{_why_unreachable(error)}, and neither the cache nor a folder of that name has it"
        return UnavailableError(what, cause, "connect and run the same command again, or name another folder")
    if isinstance(error, errors.HfHubHTTPError):
        return UnavailableError(what, f"it answered: {first_line(error)}", "check HF_TOKEN, or try again later")
    if isinstance(error, OSError) and error.errno is None:
        return UnavailableError(what, first_line(error), "run the same command again")
    return None


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether a connection failed, or is forbidden, or the hub is out of order."""
    from huggingface_hub import errors

    if error is None:
        return False
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500
    is_network = isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in _TRANSPORTS
    return is_network or (isinstance(error, errors.LocalEntryNotFoundError) and _is_unreachable(error.__cause__))


def _why_unreachable(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"the hub cannot be reached ({first_line(error.__cause__ or error)})"
