"""What a request makes of the tokens it is given: text, reasons to end, logprobs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jinfer.engine.running import Request, bad_word_ids
from jinfer.errors import RequestError
from jinfer.request.output import RequestMetrics
from jinfer.request.params import SamplingParams
from jinfer.request.tokenizer import Tokenizer, load_tokenizer
from jinfer.sampling.logprobs import Logprobs
from jinfer.schedule.plan import Chunk
from jinfer.shipped import target_folder
from jinfer.step.batch import StepOutput

EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(target_folder())


def request_of(
    tokenizer: Tokenizer | None,
    prompt_ids: Sequence[int] = (1, 5, 6),
    max_model_len: int = 100,
    **asked,
) -> Request:
    return Request(
        request_id="r",
        prompt=None,
        prompt_ids=prompt_ids,
        params=SamplingParams(**asked),
        eos_token_ids=[EOS],
        max_model_len=max_model_len,
        tokenizer=tokenizer,
    )


def step_output(
    token_ids: Sequence[int], top: Sequence[Sequence[tuple[int, float]]] = ()
) -> StepOutput:
    """One readout per token; its logprob is -9 and its rank 9, unless it is among its top."""
    num_top = max((len(row) for row in top), default=0)
    ids_RJ = np.zeros((len(token_ids), num_top), np.int32)
    values_RJ = np.full((len(token_ids), num_top), -np.inf, np.float32)
    logprob_R, rank_R = np.full(len(token_ids), -9.0, np.float32), np.full(len(token_ids), 9)
    for logits_row, row in enumerate(top):
        for place, (token_id, logprob) in enumerate(row):
            ids_RJ[logits_row, place], values_RJ[logits_row, place] = token_id, logprob
            if token_id == token_ids[logits_row]:
                logprob_R[logits_row], rank_R[logits_row] = logprob, place + 1
    logprobs = Logprobs(
        token_logprob_R=logprob_R,
        rank_R=rank_R,
        top_ids_RJ=ids_RJ,
        top_logprobs_RJ=values_RJ,
    )
    return StepOutput(token_R=np.array(token_ids, np.int32), logprobs=logprobs)


def draw(request: Request, token_id: int, place: int = 0, top: Any = (), now=5.0) -> None:
    """Gives one continuation its next token, as the engine does after a commit."""
    completion = request.completions[place]
    sequence = completion.sequence
    chunk = Chunk(sequence, 0, sequence.num_tokens - 1, 1, samples=True, num_logits_rows=1)
    sequence.output_ids.append(token_id)
    completion.append(chunk, range(1), step_output([token_id], [top] if top else ()), now)


def type_in(request: Request, tokenizer: Tokenizer, text: str) -> list[str]:
    """Draws the tokens of `text` until the output ends; the text that was shown after each."""
    shown = []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        draw(request, token_id)
        shown.append(request.completions[0].text)
        if request.finished:
            break
    return shown


def end_of(request: Request) -> tuple[str, str | None, Any]:
    one = request.output().outputs[0]
    return one.text, one.finish_reason, one.stop_reason


def test_text_grows_until_the_length_is_reached(tokenizer: Tokenizer) -> None:
    text = " a little fox"
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    request = request_of(tokenizer, max_tokens=num_tokens)
    shown = type_in(request, tokenizer, text + " and more")
    assert end_of(request) == (text, "length", None)
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:], strict=False))


def test_the_context_ends_it_where_max_tokens_does_not(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, max_model_len=5)
    draw(request, 300)
    assert not request.finished
    draw(request, 301)
    assert request.finished and end_of(request)[1] == "length"


@pytest.mark.parametrize(
    ("asked", "ending", "want"),
    [
        ({}, EOS, ("stop", None)),
        ({"stop_token_ids": [300]}, 300, ("stop", 300)),
        ({"stop_token_ids": [EOS]}, EOS, ("stop", None)),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, ("stop", EOS)),
        ({"ignore_eos": True}, EOS, (None, None)),
        # A stop token is the reason also where the length is reached by it.
        ({"stop_token_ids": [300], "max_tokens": 2}, 300, ("stop", 300)),
    ],
)
def test_an_end_token_is_told_by_vllms_rules(
    tokenizer: Tokenizer, asked: dict[str, Any], ending: int, want: Any
) -> None:
    request = request_of(tokenizer, **asked)
    draw(request, 400)
    before = request.completions[0].text
    draw(request, ending)
    assert end_of(request) == (before, *want)
    assert request.output().outputs[0].token_ids == [400, ending]


def test_a_stop_token_is_shown_only_if_asked(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, stop_token_ids=[300], include_stop_str_in_output=True)
    draw(request, 400)
    draw(request, 300)
    assert end_of(request)[0].endswith(tokenizer.token_text(300))


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_is_found_across_tokens(tokenizer: Tokenizer, included: bool) -> None:
    asked = {"stop": ["fox and"], "include_stop_str_in_output": included}
    request = request_of(tokenizer, **asked)
    shown = type_in(request, tokenizer, " the fox and the hen")
    want = " the fox and" if included else " the "
    assert end_of(request) == (want, "stop", "fox and")
    assert all(want.startswith(text) for text in shown)


def test_what_was_held_back_for_a_stop_string_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, stop=["fox and hen"])
    shown = type_in(request, tokenizer, " the fox and")
    assert shown[-1] == " the " and not request.finished
    request.completions[0].abort()
    assert end_of(request) == (" the fox and", "abort", None)


def test_min_tokens_makes_a_stop_string_only_text(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, stop=["fox"], min_tokens=20)
    type_in(request, tokenizer, " the fox and the hen")
    assert not request.finished
    assert request.completions[0].text.startswith(" the fox and the")


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.encode("\N{HERB}", add_special_tokens=False)
    assert len(pieces) > 2, "this test needs a character of several tokens"
    cut = [one for one in pieces if tokenizer.token_bytes(one)[:1] >= b"\x80"][:2]
    request = request_of(tokenizer, max_tokens=2)
    draw(request, cut[0])
    assert request.completions[0].text == ""
    draw(request, cut[1])
    assert end_of(request) == ("\N{REPLACEMENT CHARACTER}", "length", None)


def test_without_a_tokenizer_there_is_no_text() -> None:
    request = request_of(None, logprobs=0)
    draw(request, 7)
    draw(request, EOS)
    assert end_of(request) == ("", "stop", None)
    assert request.output().outputs[0].logprobs[0][7].decoded_token is None


def test_detokenize_off_leaves_the_text_empty(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, detokenize=False)
    draw(request, 400)
    assert end_of(request) == ("", None, None)


def test_logprobs_hold_the_chosen_first_and_then_the_likeliest(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, logprobs=2)
    top = [(40, -0.5), (41, -1.5), (42, -2.5)]
    draw(request, 41, top=top)
    draw(request, 77, top=top)
    first, second = request.output().outputs[0].logprobs
    assert [(key, one.logprob, one.rank) for key, one in first.items()] == [
        (41, -1.5, 2),
        (40, -0.5, 1),
    ]
    assert [(key, one.logprob, one.rank) for key, one in second.items()] == [
        (77, -9.0, 9),
        (40, -0.5, 1),
        (41, -1.5, 2),
    ]
    assert second[40].decoded_token == tokenizer.token_text(40)
    assert request.output().outputs[0].cumulative_logprob == -10.5


def test_prompt_logprobs_are_scored_once_for_all_continuations() -> None:
    request = request_of(None, prompt_ids=[1, 5, 6, 7], prompt_logprobs=1, n=3)
    assert [c.sequence.scores_prompt for c in request.completions] == [True, False, False]
    sequence = request.completions[0].sequence
    for start, stop, targets in ((0, 2, [5, 6]), (2, 3, [7])):  # in two chunks
        chunk = Chunk(sequence, 0, start, stop - start, samples=False, num_logits_rows=len(targets))
        output = step_output(targets, [[(9, -1.0)]] * len(targets))
        request.completions[0].append(chunk, range(len(targets)), output, 1.0)
    scores = request.output().prompt_logprobs
    assert scores is not None and scores[0] is None
    assert [list(entry or ()) for entry in scores[1:]] == [[5, 9], [6, 9], [7, 9]]
    assert request.metrics.num_output_tokens == 0


def test_a_request_is_finished_when_all_its_continuations_are(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, n=2)
    draw(request, EOS, place=1)
    assert not request.finished and [c.sequence.index for c in request.unfinished] == [0]
    draw(request, EOS, place=0, now=6.0)
    assert request.finished
    assert request.metrics.num_output_tokens == 2 and request.metrics.first_token_time == 5.0


def test_a_failure_keeps_what_there_was(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, n=2)
    draw(request, 400, place=0)
    draw(request, EOS, place=1)
    request.fail(error := UnicodeError("broken"))
    output = request.output()
    assert output.finished and output.error is error
    assert [one.finish_reason for one in output.outputs] == ["error", "stop"]
    assert output.outputs[0].token_ids == [400]


def test_an_output_is_a_snapshot(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, logprobs=0)
    draw(request, 400)
    before = request.output()
    draw(request, 401)
    assert before.outputs[0].token_ids == [400] and len(before.outputs[0].logprobs or ()) == 1
    assert before.metrics.num_output_tokens == 1
    assert isinstance(before.metrics, RequestMetrics) and before.metrics is not request.metrics
    assert list(before.prompt_token_ids) == [1, 5, 6] and before.num_cached_tokens == 0


def test_bad_words_are_banned_at_the_start_and_after_a_space(tokenizer: Tokenizer) -> None:
    words = bad_word_ids(["fox", " fox", "the"], tokenizer)
    assert len(set(words)) == len(words)
    spelled = {"".join(map(tokenizer.token_text, ids)).strip() for ids in words}
    assert spelled == {"fox", "the"}
    for word in ("fox", "the"):
        for text in (word, " " + word):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            assert ids in words or len(ids) != len(tokenizer.encode(word, add_special_tokens=False))
    assert bad_word_ids([], tokenizer) == bad_word_ids(["fox"], None) == ()
    with pytest.raises(RequestError, match="a bad word must be more than spaces; got '  '"):
        bad_word_ids(["  "], tokenizer)
