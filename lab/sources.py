"""Where the files of the benchmarks come from, and how each is downloaded, checked and kept.

Each is pinned by commit and SHA-256, but for seven whose checksum is not known: AIME 2025, AMC
2023, Soft Reasoning's prompts and examples, and AQuA's training file (their commits are pinned),
and the two of ASDiv-Aug (the newest commit of its branch is used).

Files are kept in $XDG_CACHE_HOME/soft-reasoning-reference, or in ~/.cache/soft-reasoning-reference
where that variable is unset.
"""

import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from model import UserError

ROOT = Path(__file__).resolve().parent.parent

# -------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Source:
    """A file of a repository at one commit, or of a branch whose commits are not known."""

    repository: str  # of GitHub, or of Hugging Face where it begins with 'datasets/'
    commit: str  # or the name of a branch
    path: str
    bytes: int | None = None
    sha256: str | None = None  # None: no checksum is known, and the user is told so

    @property
    def url(self) -> str:
        if self.repository.startswith("datasets/"):
            return f"https://huggingface.co/{self.repository}/resolve/{self.commit}/{self.path}"
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.path}"


GSM8K = "openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c"
SOFT_THINKING = "eric-ai-lab/Soft-Thinking", "b97407c60d5e971da4a4fe76f405d6e236d0ddfa"
SOFT_REASONING = "alickzhu/Soft-Reasoning", "229b5f7803d930e685b4902fcef40c15daa193e2"
STRATEGYQA = "eladsegal/strategyqa", "1ba1e97452e189569357876f2854b01357ffbe37"
HUMANEVAL = "openai/human-eval", "6d43fb980f9fee3c892a914eda09951f772ad10d"
AQUA = "google-deepmind/AQuA", "26b64ed1f22208c6742f47df547dfd65088ec30d"
ZERO_SHOT_COT = "kojima-takeshi188/zero_shot_cot", "5ef330fcdeec0cd26aee27943504f91f8ec1c33c"
ASDIV_AUG = "datasets/xuyige/ASDiv-Aug", "main"  # a branch: what it holds may change
MADE = {"tiny/graph/train.jsonl": "make it with `python tiny/graph.py`"}  # not in the repository

SOURCES = {  # name in the cache folder -> repository and commit, path, bytes, SHA-256
    "gsm8k_test.jsonl": Source(
        *GSM8K,
        "grade_school_math/data/test.jsonl",
        749738,
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    "gsm8k_train.jsonl": Source(
        *GSM8K,
        "grade_school_math/data/train.jsonl",
        4166206,
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    "math500.json": Source(
        *SOFT_THINKING,
        "datasets/math500.json",
        183569,
        "236bd0cc329ee3efaf045a150e6473e4f420e7e7e17051a4e77a1f2688599e63",
    ),
    "aime2024.json": Source(
        *SOFT_THINKING,
        "datasets/aime2024.json",
        14742,
        "d7e2deccb589c973cffabb5d36e8e428a9c9c595dae6b6c95beb2ee2cfa870c3",
    ),
    "aime2025.json": Source(*SOFT_THINKING, "datasets/aime2025.json"),
    "amc23.json": Source(*SOFT_THINKING, "datasets/amc23.json"),
    "gpqa_diamond.json": Source(
        *SOFT_THINKING,
        "datasets/gpqa_diamond.json",
        200369,
        "a24a0e376dcf6d1ea515ed6810c3918293406655ea760b6c2ab76e8b96af88da",
    ),
    "mbpp.json": Source(
        *SOFT_THINKING,
        "datasets/mbpp.json",
        203657,
        "1a2894d0aadfb104c2c43b5d241f559f8bee4bc3db85336196031d96afce5822",
    ),
    "humaneval.jsonl.gz": Source(
        *HUMANEVAL,
        "data/HumanEval.jsonl.gz",
        44877,
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
    "gsm_hard.json": Source(
        *SOFT_REASONING,
        "data/gsm_hard.json",
        411978,
        "d698bce4c0192e954115d4c319e96e7f24c90b0013baabc50da56a83c896cdad",
    ),
    "svamp.json": Source(
        *SOFT_REASONING,
        "data/svamp.json",
        68388,
        "c96981cf2fe2a3a5395157122d8996b8f6393acebe68b863a4e1061a9960b789",
    ),
    "strategyqa_test.json": Source(
        *SOFT_REASONING,
        "data/strategyqa.json",
        261677,
        "fb96d55e1e039c8d14d1d776ba50f8f2cf495aedeb2d3dc65fc5e415aa94c63f",
    ),
    "soft_reasoning_prompts.yaml": Source(*SOFT_REASONING, "prompts.yaml"),
    "soft_reasoning_examples.json": Source(*SOFT_REASONING, "data/few_shot_example.json"),
    "strategyqa_train.json": Source(
        *STRATEGYQA,
        "data/strategyqa/train.json",
        3857762,
        "0f72560b8a6fad3db847d2f1a7524fb087297843bb45a8d3245ffd68cbe0de12",
    ),
    "aqua_dev.json": Source(
        *AQUA,
        "dev.json",
        132008,
        "4a52301d8a49ae0b286f8e697f9c5da1b109b247b825b47b4c6de34312dceec5",
    ),
    "aqua_test.json": Source(
        *AQUA,
        "test.json",
        130192,
        "de41581881ef95c5588c44ddc701c77fd480839241dd422a0d181262af24520c",
    ),
    "aqua_train.json": Source(*AQUA, "train.json"),
    "date_understanding.json": Source(
        *ZERO_SHOT_COT,
        "dataset/Bigbench_Date/task.json",
        119336,
        "ff716f0e399109146db3a998281c39954907b78268a9b633a95582d63847822f",
    ),
    "asdiv_aug_train.jsonl": Source(*ASDIV_AUG, "aug-train.jsonl"),
    "asdiv_aug_test.jsonl": Source(*ASDIV_AUG, "aug-dev.jsonl"),
}

# ---------------------------------------------------------------------------------------- downloads


def cache_folder() -> Path:
    """The folder of the downloaded files; it may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "soft-reasoning-reference"


def fetch(name: str) -> Path:
    """Find the file with a name in SOURCES, downloaded on first use, or a path in the repository.

    Raises UserError where there is no network, where the checksum differs (the file is kept aside
    and not used), where the folder cannot be written to, and where a bundled file is missing.
    """
    if name not in SOURCES:
        path = ROOT / name
        if not path.exists():
            remedy = MADE.get(name, f"it comes with the repository: git checkout {name}")
            raise UserError(f"{path} is missing; {remedy}")
        return path
    source, path = SOURCES[name], cache_folder() / name
    if not path.exists():
        path = download(source, path)
    if source.sha256 is None:
        pin = "its commit" if len(source.commit) == 40 else "nothing, it may change at its source"
        said = f"no checksum is known for this file, it is used unverified (pinned by {pin})"
        print(f"{name}: {said}", file=sys.stderr)
        return path
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        aside = path.with_name(path.name + ".wrong-checksum")
        try:
            os.replace(path, aside)
            kept = f"kept aside as {aside}"
        except OSError:
            kept = f"left at {path}, which cannot be renamed"
        raise UserError(
            f"{name} is not the file it should be: SHA-256 {found} instead of {source.sha256}; it "
            f"is {kept} and not used. Start again to download it anew from {source.url}"
        )
    return path


def download(source: Source, path: Path) -> Path:
    """Download a file to `path`, or into Hugging Face's own cache, and return where it is.

    The file is there as a whole or not at all. Raises UserError where it cannot be had or kept.
    """
    by_hand = f"get {source.url} by hand and put it at {path}"
    if source.repository.startswith("datasets/"):
        import huggingface_hub  # half a second, and needed by one task only

        repository = source.repository.removeprefix("datasets/")
        try:
            file = huggingface_hub.hf_hub_download(
                repository, source.path, repo_type="dataset", revision=source.commit
            )
            return Path(file)
        except (OSError, ValueError) as error:  # its network errors are OSErrors
            reason = str(error).partition("\n")[0]
            raise UserError(f"Hugging Face gave no {source.path} ({reason}); {by_hand}") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {path.parent} ({error.strerror}); make it "
            f"writable, or set XDG_CACHE_HOME to a folder that is, or {by_hand}"
        ) from None
    try:
        with (
            open(handle, "wb") as file,
            urllib.request.urlopen(source.url, timeout=30) as response,
        ):
            length = response.headers["Content-Length"]
            size = int(length) if length else source.bytes
            with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
                while block := response.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
                if length and bar.n != size:
                    raise OSError(f"the connection broke after {bar.n} of {size} bytes")
        os.replace(temporary, path)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise UserError(f"cannot download {source.url} to {path} ({error}); {by_hand}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
