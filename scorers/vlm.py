"""A vision-language model on this machine as a judge: a Qwen-VL checkpoint is asked by a rubric of rubrics.py.

The reply is greedy. Of a rubric that asks for one score token, the expectation over its probabilities is the score (Q
Eq. 12).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor
from transformers import GenerationConfig

from data.files import Prompt
from models import qwen_vl
from rewards import RewardError, Scorer
from scorers.rubrics import PILLAR, SCALES, Rubric, named, read, user_turn


def vlm(
    rubric: str | Rubric, model: str = "", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> Scorer:  # fmt: skip
    """A Qwen-VL checkpoint as a judge, through transformers, greedy. Scores in [0.2, 1]. Q §3; F App. A.

    rubric: a name of `rubrics.RUBRICS`; model: a folder or Hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, as
    published or fine-tuned, by default the rubric's own. Safetensors only, no remote code. `batch` pictures are asked
    about at a time. Raises RewardError, one line, for a checkpoint that cannot be asked, among them DeQA's own and
    UnifiedReward-7b's (UnifiedReward-qwen-7b, from the same authors, is a Qwen2.5-VL and can); ModelError without one.
    """
    asked = named(rubric) if isinstance(rubric, str) else rubric
    judge = _load(model or asked.model, device, dtype)
    spelled = {word: (word, f" {word}", word.title()) for word in SCALES.get(asked.ask, ())}
    words = single_tokens(judge, spelled, asked.name)

    def question(prompt: Prompt, image: Tensor, sources: Sequence[Tensor]) -> qwen_vl.Question:
        with _about(asked, prompt):
            turn = user_turn(asked, prompt.text, [*sources, image])
        return qwen_vl.chat(asked.system, turn)

    def score_of(prompt: Prompt, reply: str, is_whole: bool, logprobs: Mapping[str, float] | None) -> float:
        with _about(asked, prompt):
            if not is_whole:
                raise RewardError(f"the reply is cut off after {asked.max_tokens} tokens: {reply!r}")
            return read(asked, reply, logprobs)

    def score(images: Tensor, prompts: Sequence[Prompt], sources: Sequence[Sequence[Tensor]] | None = None) -> Tensor:
        rows, scores = list(zip(prompts, images, sources or [()] * len(prompts), strict=True)), []
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            replies = _ask(judge, [question(*row) for row in some], words, asked.max_tokens)
            scores += [score_of(row[0], *reply) for row, reply in zip(some, replies, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    return Scorer(asked.name, score, asked.low, 1.0, silent=asked.ask == PILLAR)


@contextmanager
def _about(rubric: Rubric, prompt: Prompt) -> Iterator[None]:
    """Says in a RewardError which scorer and which prompt it is about."""
    try:
        yield
    except RewardError as fault:
        raise RewardError(f"scorer {rubric.name!r}: {fault}, for the prompt {prompt.text!r}") from None


@cache
def _load(where: str, device: torch.device | str, dtype: torch.dtype) -> qwen_vl.VLM:
    """A Qwen-VL that answers greedily. Scorers that ask one checkpoint by several rubrics share it."""
    judge = qwen_vl.load(where, device, dtype)
    ends = [judge.token(token) for token in ("<|im_end|>", "<|endoftext|>")]
    # Qwen publishes sampling settings and a repetition penalty beside its weights; a judge is asked for the likeliest.
    judge.network.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[-1])
    return judge


def single_tokens(judge: qwen_vl.VLM, spellings: Mapping[str, Sequence[str]], who: str) -> dict[int, str]:
    """{token id: text} of the spellings, by word, that are one token. RewardError by `who` for a word without any."""
    encode, found = partial(judge.tokenizer.encode, add_special_tokens=False), {}
    for word, some in spellings.items():
        own = {ids[0]: text for text in some if len(ids := encode(text)) == 1}
        if not own:
            raise RewardError(f"scorer {who!r}: the judge's tokenizer has no single token for {word!r}")
        found |= own
    return found


@torch.no_grad()
def _ask(judge: qwen_vl.VLM, questions: Sequence[qwen_vl.Question], candidates: Mapping[int, str], max_tokens: int):
    """Greedy replies to questions: for each (its text, has it come to its end, the candidates' log-probs or None).

    Of a single token both ends are the same, and its log-probs are looked up.
    """
    inputs, options = judge.inputs(questions), {"output_logits": bool(candidates), "return_dict_in_generate": True}
    told, answers = judge.network.generate(**inputs, max_new_tokens=max_tokens, **options), []
    for b, ids in enumerate(told.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
        ends = (i for i, token in enumerate(ids) if token in judge.network.generation_config.eos_token_id)
        length, logprobs = next(ends, None), None
        if candidates:
            row = told.logits[0][b].float().log_softmax(-1)[list(candidates)].tolist()
            logprobs = dict(zip(candidates.values(), row, strict=True))
        answers.append((judge.tokenizer.decode(ids[:length]), length is not None or max_tokens == 1, logprobs))
    return answers
