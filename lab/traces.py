"""What `--trace` kept of a thought: tokens' texts, entropies, Cold Stop, and a CoT beside it."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import huggingface_hub

from lab.charts import visible
from lab.checkpoint import check_tokenizer
from model import ALIASES, Tokenizer

PIECE = 200  # tokens at most that one row of the page holds

# ------------------------------------------------------------------------------------------ tokens


def tokenizer_of(name: str) -> Tokenizer | None:
    """That of a model which is here: a folder, or in the Hugging Face cache. Nothing is fetched.

    UserError for one that is damaged.
    """
    try:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            name = ALIASES.get(name.lower(), name)
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError, RuntimeError):  # not in the cache; no name of a repository
        return None
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return Tokenizer(folder)
    except Exception:
        check_tokenizer(folder)  # says in one line what is wrong with it
        raise


class Names:
    """Token ids as text; without a tokenizer as their numbers."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer, self.known = tokenizer, {}
        # Some tokenizers drop the space of a text's first token: it is read behind another one.
        self.before = tokenizer.encode("a")[-1:] if tokenizer else []

    def read(self, ids: list[int]) -> str:
        decode = self.tokenizer.decode
        return decode(self.before + ids)[len(decode(self.before)) :]

    def name(self, token: int) -> str:
        """One token's text; \ufffd stands for a character that needs several tokens."""
        if token not in self.known:
            known = self.tokenizer and self.tokenizer.core.id_to_token(token) is not None
            self.known[token] = self.read([token]) if known else f"#{token} "
        return self.known[token]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Each token's text; a character of several tokens stands at the last of them."""
        texts, open_ids = [], []
        for token in ids:
            text = self.name(token)
            if self.tokenizer and (open_ids or "\ufffd" in text):
                open_ids.append(token)
                text = self.read(open_ids)
                if "\ufffd" in text and len(open_ids) < 4:  # UTF-8 has at most four bytes
                    texts.append("")
                    continue
                open_ids = []
            texts.append(text)
        return texts


# ----------------------------------------------------------------------------------------- thought


@dataclass(frozen=True)
class Trace:
    """The thought of a record with `steps`; number is that of the record on the page."""

    record: dict
    names: Names
    number: int = 0

    @property
    def steps(self) -> list[dict]:
        return self.record["steps"]

    @property
    def ids(self) -> list[int]:
        return self.record["thought_ids"][: len(self.steps)]

    @cached_property
    def texts(self) -> list[str]:
        return self.names.texts(self.ids)

    @cached_property
    def streak(self) -> list[int]:
        """Sure steps in a row, as Cold Stop counts them, up to each step."""
        threshold = self.record["settings"].get("cold_stop_entropy", 0)
        counts, count = [], 0
        for step in self.steps:
            count = count + 1 if step["entropy"] < threshold else 0
            counts.append(count)
        return counts

    @cached_property
    def strike(self) -> int | None:
        """The step in which Cold Stop began to close the thought."""
        if self.record.get("stopped_by") != "cold_stop":
            return None
        needed = self.record["settings"]["cold_stop_steps"]
        return next((t for t, count in enumerate(self.streak) if count >= needed), None)

    @cached_property
    def greedy(self) -> dict[int, int]:
        """Step -> the most probable token, where the step is named by another one.

        A sampled token or one that noise chose differs; a mixture bears the name of its greatest
        share. Under Dirichlet noise the model's own order is not in the record.
        """
        if self.record["settings"].get("noise") == "dirichlet":
            return {}
        tops = [step["ids"][0] if step["ids"] else None for step in self.steps]
        pairs = enumerate(zip(self.ids, tops))
        return {t: top for t, (token, top) in pairs if top is not None and top != token}

    def pieces(self) -> list[range]:
        """The steps sentence by sentence, and line by line."""
        found, start = [], 0
        for t, text in enumerate(self.texts):
            following = self.texts[t + 1] if t + 1 < len(self.texts) else " "
            ends = re.search(r"[.!?:]\W*$", text) and following[:1].isspace()
            if "\n" in text or ends or t + 1 - start == PIECE or t + 1 == len(self.texts):
                found.append(range(start, t + 1))
                start = t + 1
        return found

    def rows(self, beside: Sequence[str] = ()) -> list[dict]:
        """For the page: each piece as runs (classes, text, tip), and the text beside it.

        A run is a token, or several in a row that are sure and have nothing to say.
        """
        pieces = self.pieces()
        said = ["".join(self.texts[t] for t in piece) for piece in pieces]
        said = [text.strip().removesuffix("</think>").strip() for text in said]
        found = []
        for own, other in aligned(said, beside):
            steps = pieces[own] if own is not None else ()
            there = None if other is None else beside[other]
            same = own is not None and there == said[own]
            runs: list[tuple[str, str, str]] = []
            for look, text, tip in map(self.token, steps):
                if runs and not look and not runs[-1][0]:
                    text = runs.pop()[1] + text
                runs.append((look, text, tip))
            start = steps[0] if steps else None
            found.append({"start": start, "runs": runs, "beside": there, "same": same})
        return found

    def token(self, t: int) -> tuple[str, str, str]:
        """Classes, text and tip: h1 to h7 by entropy, d: not greedy, f: Cold Stop, z: empty."""
        H, looks = self.steps[t]["entropy"], []
        if level := min(7, round(7 * math.sqrt(max(H, 0) / 2.5))):
            looks.append(f"h{level}")
        tip = ""
        if t in self.greedy:
            looks.append("d")
            tip = f"greedy decoding: {self.names.name(self.greedy[t])}"
        if self.strike is not None and t >= self.strike:
            looks.append("f")
        if not self.texts[t]:
            looks.append("z")  # an element of its own: a text of no length has no end
        return " ".join(looks), self.texts[t], tip

    def data(self) -> str:
        """For the page's script, by step: H to five decimals, c the components and n the length of
        the text; by those steps that have one: d the greedy token, t the own one.

        Components are [id, share in 1/10,000, ...], or the id of a single one.
        """
        components: list[int | list[int]] = []
        for step in self.steps:
            pairs = [(i, round(1e4 * p)) for i, p in zip(step["ids"], step["probs"])]
            single = len(pairs) == 1 and pairs[0][1] == 10_000
            components.append(pairs[0][0] if single else [x for pair in pairs for x in pair])
        entropies = [round(step["entropy"], 5) or 0 for step in self.steps]
        pairs = enumerate(zip(self.ids, self.steps))
        own = {t: token for t, (token, step) in pairs if step["ids"][:1] != [token]}
        lengths = [len(visible(text)) for text in self.texts]
        about = {"H": entropies, "c": components, "n": lengths, "d": self.greedy, "t": own}
        return in_script(about)

    def least_sure(self, most: int = 10) -> list[dict]:
        """Of the steps with several components those of the largest entropy, in their order."""
        several = [t for t, step in enumerate(self.steps) if len(step["ids"]) > 1]
        order = sorted(several, key=lambda t: -self.steps[t]["entropy"])
        found = []
        for t in sorted(order[:most]):
            step = self.steps[t]
            shares = [(self.names.name(i), p) for i, p in zip(step["ids"], step["probs"])]
            about = {"step": t + 1, "text": self.texts[t], "entropy": step["entropy"]}
            found.append(about | {"components": shares})
        return found


def in_script(data: object) -> str:
    """JSON that no text in it can end or open an element with."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def sentences(text: str) -> list[str]:
    """A text as `pieces` cuts a thought, without the spaces at their ends."""
    return [part.strip() for part in re.split(r"\n+|(?<=[.!?:])\s+", text) if part.strip()]


def aligned(a: Sequence[str], b: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Rows of two columns: pairs of indices into a and b, equal texts side by side."""
    rows = []
    for _, i, i_end, j, j_end in difflib.SequenceMatcher(None, a, b).get_opcodes():
        for k in range(max(i_end - i, j_end - j)):
            rows.append((i + k if i + k < i_end else None, j + k if j + k < j_end else None))
    return rows


# ---------------------------------------------------------------------------------------- exchange


def logprobs(trace: Trace) -> dict:
    """The thought in the form of OpenAI's chat completions with `logprobs` and `top_logprobs`.

    Shares of a concept token are in the place of probabilities: after truncation, summing to 1.
    """
    found = []
    for t, step in enumerate(trace.steps):
        pairs = zip(step["ids"], step["probs"])
        top = [entry(trace.names, i, p) for i, p in pairs]
        token = trace.ids[t]
        of_token = dict(zip(step["ids"], step["probs"])).get(token)
        found.append(entry(trace.names, token, of_token) | {"top_logprobs": top})
    record = trace.record
    about = {name: record[name] for name in ("problem", "method", "sample") if name in record}
    message = {"role": "assistant", "content": "".join(trace.texts)}
    choice = {"index": 0, "message": message, "finish_reason": record.get("finish_reason")}
    model = record["settings"].get("model")
    choice["logprobs"] = {"content": found}
    return {"object": "chat.completion", "model": model, "choices": [choice], "metadata": about}


def entry(names: Names, token: int, p: float | None) -> dict:
    """A token; -9999.0 as there for one whose probability is not given; bytes of whole text."""
    text = names.name(token)
    whole = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
    logprob = math.log(p) if p else -9999.0
    return {"token": text, "logprob": logprob, "bytes": whole}
