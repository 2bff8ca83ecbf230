"""What a request makes of the tokens it is given: text, reasons to end, logprobs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jinfer.engine.running import Request, stop_reasons
from jinfer.errors import NaNLogitsError, RequestError
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
        vocab_size=4096,
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


def test_a_token_that_completes_a_bad_word_is_taken_back(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, n=2, bad_words=["daughter"], logprobs=0)
    start = tokenizer.encode(" daugh", add_special_tokens=False)
    *middle, last = (tokenizer.token_id(one) for one in "ter")
    for token_id in (*start, *middle):
        draw(request, token_id)
    before, sequence = request.output().outputs[0], request.completions[0].sequence
    draw(request, last)
    assert request.output().outputs[0] == before
    assert request.metrics.num_output_tokens == len(before.token_ids)
    spelling = (*start, *middle, last)
    assert request.completions[0].bad_words.spellings[-1] == spelling[-8:]
    assert spelling[-8:] not in request.completions[1].bad_words.spellings
    again = sequence.restarted()
    assert again.output_ids == before.token_ids and again.slot is None
    request.completions[0].sequence = again
    draw(request, tokenizer.encode("nt", add_special_tokens=False)[0])
    assert request.completions[0].text.startswith(" daughten")


def test_a_token_of_nan_logits_is_an_error(tokenizer: Tokenizer) -> None:
    request = request_of(tokenizer, logprobs=0)
    draw(request, 400)
    with pytest.raises(NaNLogitsError, match="the logits are NaN, after 4 tokens. Check the weig"):
        draw(request, -1)
    assert request.output().outputs[0].token_ids == [400]
    assert issubclass(NaNLogitsError, RequestError)


def test_the_tokenizers_end_token_stops_too(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id == EOS
    for eos_token_ids in ([7], []):
        request = Request(
            request_id="r",
            prompt=None,
            prompt_ids=[5],
            params=SamplingParams(min_tokens=1, n=2),
            eos_token_ids=eos_token_ids,
            vocab_size=4096,
            max_model_len=9,
            tokenizer=tokenizer,
        )
        assert set(request.stop_ids) == {EOS, *eos_token_ids}  # all forbidden before min_tokens
        draw(request, EOS, place=1)
        assert request.output().outputs[1].finish_reason == "stop"
    assert request_of(tokenizer, ignore_eos=True).stop_ids == ()
    assert request_of(tokenizer, ignore_eos=True, stop_token_ids=[9]).stop_ids == (9,)


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_stop_string_that_is_a_special_token_stops(
    tokenizer: Tokenizer, hidden: bool, included: bool
) -> None:
    request = request_of(
        tokenizer,
        stop=["<s>", "zzz"],
        skip_special_tokens=hidden,
        include_stop_str_in_output=included,
        min_tokens=1,
    )
    assert (1 in request.stop_ids) == hidden
    draw(request, 400)
    before = request.completions[0].text
    draw(request, 1)
    assert end_of(request) == (before + "<s>" * included, "stop", "<s>")


def test_an_end_token_that_is_also_a_stop_string_is_told_as_end_token(
    tokenizer: Tokenizer,
) -> None:
    request = request_of(tokenizer, stop=["</s>"])
    draw(request, EOS)
    assert end_of(request) == ("", "stop", None)
    request = request_of(tokenizer, stop=["</s>"], ignore_eos=True)
    draw(request, EOS)
    assert end_of(request) == ("", "stop", "</s>")


def test_tokens_that_the_model_lacks_stop_nothing(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=["<s>", "</s>"])
    assert stop_reasons(params, [0], tokenizer, vocab_size=1) == {0: None}
    assert stop_reasons(params, [0], tokenizer, vocab_size=2) == {1: "<s>", 0: None}


def test_logprobs_of_the_whole_vocabulary() -> None:
    request = request_of(None, logprobs=-1)
    draw(request, 41, top=[(40, -0.5), (41, -1.5), (42, -2.5)])
    [entry] = request.output().outputs[0].logprobs
    assert sorted(entry) == [40, 41, 42]
