"""What SoftCoT's table puts in the prompt in place of soft thoughts.

CoT-Unk: placeholder tokens with their own embeddings (`softcot.answer` without `think`), or with
ones that were trained, a soft prompt. Assist-CoT: what the assistant says, as a hint in words.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import Prompt, Request, Tokenizer, Transformer, check_prompt, decode
from softcot import INSTRUCTION, Sampler

HINT = "{question}\nHint: {hint}"


def soft_prompt(model: Transformer, unk: int, n: int) -> dict[str, Tensor]:
    """What is trained of CoT-Unk, [n, d] in float32: at first the placeholders' embeddings."""
    return {"prompt": model.embed.weight[unk].detach().float().repeat(n, 1)}


def hints(
    assistant: Transformer, tokenizer: Tokenizer, questions: list[str], n: int, batch_size: int = 16
) -> dict[str, str]:
    """Question -> the first n tokens that the assistant says, greedily (its own tokenizer)."""
    encoded = {}
    for question in dict.fromkeys(questions):
        message = INSTRUCTION.format(question=question)
        encoded[question] = tokenizer.chat(message, date_string="26 Jul 2024")
    for question, ids in encoded.items():
        check_prompt(assistant.config, ids, question, "the assistant's")
    rows = assistant.plan(batch_size, max(map(len, encoded.values())), n)

    def requests() -> Iterator[Request]:
        for question, ids in encoded.items():
            embeds = assistant.embed(torch.tensor(ids, device=assistant.device))
            yield Request(Prompt(embeds), data=question)

    found = {}
    for output in decode(assistant, requests(), Sampler(assistant), rows, n):
        said = [t for t in output.ids if t not in assistant.config.eos_ids]
        found[output.request.data] = tokenizer.decode(said)
    return found
