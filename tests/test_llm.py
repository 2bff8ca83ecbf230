"""The Python API on the shipped model: what goes in, what comes back, when the device is free."""

import dataclasses
import gc
import io
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

import jinfer.engine.engine
from jinfer import LLM, RequestError, RequestOutputKind, SamplingParams
from jinfer.engine.engine import STEPS_WITH_STOP_STRINGS
from jinfer.engine.running import Completion
from jinfer.schedule.scheduler import STEPS_WHILE_WAITING, Scheduler

# Two programs, the same in every module, so that they are compiled once.
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "max_model_len": 128, "progress": False}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS = ["Once upon a time", "The cat sat on the", "A king had three"]


@pytest.fixture(scope="module")
def module_llm() -> Iterator[LLM]:
    with LLM(late_compile="error", **SMALL) as llm:
        yield llm


@pytest.fixture
def llm(module_llm: LLM) -> Iterator[LLM]:
    """An engine that must be idle, whole and without late programs after every test."""
    num_free = module_llm.engine.scheduler.num_free_pages
    yield module_llm
    engine = module_llm.engine
    while engine.has_work:
        engine.step()
    assert engine.scheduler.num_free_pages == num_free
    assert engine.num_late_compiles == 0
    assert not engine._requests and not engine._completions


def ids_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def text_of(output: Any) -> str:
    return output.outputs[0].text


def greedy(num_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **params)


# -- prompts and order


def test_every_spelling_of_a_prompt_gives_the_same_answer(llm: LLM) -> None:
    text = PROMPTS[0]
    ids = llm.get_tokenizer().encode(text)
    spellings = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}, np.array(ids)]
    outputs = llm.generate(spellings, GREEDY)
    assert [list(output.prompt_token_ids) for output in outputs] == [ids] * 5
    assert [output.prompt for output in outputs] == [text, None, text, None, None]
    assert len({text_of(output) for output in outputs}) == 1
    for one in (text, ids, {"prompt": text}):
        [output] = llm.generate(one, GREEDY)
        assert ids_of(output) == ids_of(outputs[0])
    assert llm.generate([]) == []


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    lengths = [9, 1, 5, 2, 7, 3, 8, 4, 6, 1, 2, 3]
    prompts = [[10 + i] * (1 + i) for i in range(12)]
    outputs = llm.generate(prompts, [greedy(length) for length in lengths])
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [len(ids_of(output)) for output in outputs] == lengths
    assert all(output.finished and output.error is None for output in outputs)
    assert len({output.request_id for output in outputs}) == 12


def test_as_completed_yields_each_once_the_short_ones_first(llm: LLM) -> None:
    lengths = [30, 1, 12]
    places = [
        (place, len(ids_of(output)))
        for place, output in llm.as_completed(PROMPTS, [greedy(n) for n in lengths])
    ]
    assert places == [(1, 1), (2, 12), (0, 30)]


def test_defaults_are_those_of_the_checkpoint(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p) == (0.6, 0.95)


def test_chat_answers_what_the_template_renders(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Tell me of a fox."}]
    prompt = llm.render(messages)
    assert prompt.token_ids is not None and prompt.token_ids[0] == 1
    assert prompt.token_ids.count(1) == 1  # the template writes it, the tokenizer not again
    [output] = llm.chat(messages, GREEDY)
    two = llm.chat([messages, messages], GREEDY)
    [want] = llm.generate(list(prompt.token_ids), GREEDY)
    assert {text_of(output), *map(text_of, two)} == {text_of(want)}
    assert output.prompt == prompt.text
    assert llm.chat(messages, GREEDY, chat_template="{{ messages[0].content }}")[0].prompt == (
        "Tell me of a fox."
    )
    named = "{{ bos_token }}{{ eos_token }}{{ unk_token }}"
    assert llm.render(messages, chat_template=named).text == "<s></s><unk>"


def test_the_progress_line_counts_tokens(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate(PROMPTS, GREEDY)
    assert capsys.readouterr().err == ""  # progress=False
    monkeypatch.setattr(llm.engine, "config", dataclasses.replace(llm.engine.config, progress=True))
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS, GREEDY)
    line = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "Processed prompts: 100%" in line and "3/3" in line
    assert "input 0 tok/s" not in line and "output 0 tok/s" not in line
    assert "tok/s, output " in line


# -- as scripts of vLLM call it


def test_arguments_of_vllm_that_ask_for_nothing_change_nothing(llm: LLM) -> None:
    want = llm.generate(PROMPTS[:2], GREEDY)
    got = llm.generate(PROMPTS[:2], GREEDY, False, None, 3, tokenization_kwargs=None)
    assert list(map(ids_of, got)) == list(map(ids_of, want))
    messages = [{"role": "user", "content": "A fox."}]
    chats = llm.chat(messages, GREEDY, False, None, [1], chat_template_content_format="auto")
    assert ids_of(chats[0]) == ids_of(llm.chat(messages, GREEDY)[0])


def test_arguments_of_vllm_that_ask_for_more_are_refused(llm: LLM) -> None:
    adapter: Any = "an adapter"
    with pytest.raises(NotImplementedError, match="lora_request must be None; got .* LoRA"):
        llm.generate(PROMPTS, GREEDY, lora_request=adapter)
    with pytest.raises(NotImplementedError, match="lora_request must be None; got .* LoRA"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, lora_request=[None, adapter])


def test_a_function_may_make_the_bar(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.engine, "config", dataclasses.replace(llm.engine.config, progress=True))
    bars = []

    def make(**keywords: Any) -> Any:
        bars.append(tqdm(**{**keywords, "file": io.StringIO()}))
        return bars[0]

    llm.generate(PROMPTS, GREEDY, use_tqdm=make)
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3)]


def test_small_methods_of_vllm(llm: LLM) -> None:
    assert repr(llm) == "LLM(model='fable')"
    assert llm.get_world_size() == llm.get_world_size(include_dp=False) == 1
    assert llm.reset_prefix_cache() is True
    assert llm.get_default_sampling_params() == SamplingParams.from_defaults(
        llm.engine.defaults.sampling
    )
    assert not hasattr(llm, "beam_search")


def test_a_bad_prompt_or_chat_of_many_is_named_by_its_index(llm: LLM) -> None:
    too_long = [5] * 200
    with pytest.raises(RequestError, match="^prompt 1: .*max_model_len"):
        llm.generate([[5, 6], too_long, [7]], GREEDY)
    with pytest.raises(RequestError, match="^a prompt .*max_model_len"):
        llm.generate(too_long, GREEDY)
    good = [{"role": "user", "content": "x"}]
    with pytest.raises(RequestError, match=r"^conversation 2: messages\[0\] must be a dict"):
        llm.chat([good, good, ["x"]], GREEDY)  # pyright: ignore[reportArgumentType]


def test_the_engines_template_is_the_default_of_chats(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "_chat_template", "The {{ messages[0].content }}")
    messages = [{"role": "user", "content": "fox"}]
    assert llm.render(messages).text == "The fox"
    assert llm.render(messages, chat_template="A {{ messages[0].content }}").text == "A fox"


# -- streams


def test_a_stream_grows_to_the_answer(llm: LLM) -> None:
    [want] = llm.generate(PROMPTS[0], GREEDY)
    seen = list(llm.stream(PROMPTS[0], GREEDY))
    assert [len(ids_of(output)) for output in seen] == list(range(1, 9))
    assert [output.finished for output in seen] == [False] * 7 + [True]
    assert ids_of(seen[-1]) == ids_of(want) and text_of(seen[-1]) == text_of(want)
    for before, after in zip(seen, seen[1:], strict=False):
        assert text_of(after).startswith(text_of(before))
        assert before.metrics.num_output_tokens + 1 == after.metrics.num_output_tokens
    assert seen[0].metrics.finished_time is None  # a snapshot, which later steps leave alone


def test_leaving_a_stream_ends_its_request(llm: LLM) -> None:
    for _ in llm.stream(PROMPTS[0], greedy(100)):
        break
    gc.collect()
    assert not llm.engine.scheduler.has_work
    for _ in llm.as_completed(PROMPTS, [greedy(2), greedy(100), greedy(100)]):
        break
    gc.collect()
    assert not llm.engine.scheduler.has_work


def test_a_stream_that_ends_inside_a_step_leaves_after_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python's garbage collector may end one at any moment."""
    wanted = [ids_of(output) for output in llm.generate(PROMPTS, greedy(8))]
    abandoned = [llm.stream(PROMPTS[0], greedy(100))]
    next(abandoned[0])
    trim = Scheduler._trim

    def collect(self: Scheduler, draft: Any) -> None:
        if abandoned:
            abandoned.pop().close()
        trim(self, draft)

    monkeypatch.setattr(Scheduler, "_trim", collect)
    assert [ids_of(output) for output in llm.generate(PROMPTS, greedy(8))] == wanted
    assert not abandoned and not llm.engine.scheduler.has_work


def test_a_dispatch_is_long_unless_the_host_must_look(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []  # of each dispatch that decodes: who waited, and how many
    pack_decode = jinfer.engine.engine.pack_decode

    def note(plan: Any, *args: Any, **keywords: Any) -> Any:
        steps.append((llm.engine.scheduler.num_waiting, plan.num_steps))
        return pack_decode(plan, *args, **keywords)

    def most(params: SamplingParams) -> int:
        steps.clear()
        llm.generate(PROMPTS[0], params)
        return max(num_steps for _, num_steps in steps)

    monkeypatch.setattr(jinfer.engine.engine, "pack_decode", note)
    assert most(greedy(60)) > STEPS_WITH_STOP_STRINGS
    assert most(greedy(60, stop=["not in the answer"])) == STEPS_WITH_STOP_STRINGS
    steps.clear()
    list(llm.stream(PROMPTS[0], greedy(10)))
    assert {num_steps for _, num_steps in steps} == {1}
    steps.clear()
    [only] = llm.stream(PROMPTS[0], greedy(60, output_kind=RequestOutputKind.FINAL_ONLY))
    assert max(num_steps for _, num_steps in steps) > STEPS_WITH_STOP_STRINGS
    assert only.finished and len(ids_of(only)) == 60
    steps.clear()
    num_slots = llm.engine.plan.max_slots
    llm.generate([[5]] * (num_slots + 1), [greedy(20)] * num_slots + [greedy(60)])
    waited = {num_steps for num_waiting, num_steps in steps if num_waiting}
    assert waited and max(waited) == STEPS_WHILE_WAITING
    alone = max(num_steps for num_waiting, num_steps in steps if not num_waiting)
    assert alone > STEPS_WHILE_WAITING


def test_deltas_add_up(llm: LLM) -> None:
    asked = {"logprobs": 1, "prompt_logprobs": 0, "n": 2, "seed": 5, "temperature": 1.0}
    params = SamplingParams(max_tokens=9, ignore_eos=True, **asked)
    [whole] = llm.generate(PROMPTS[0], params)
    deltas = list(
        llm.stream(PROMPTS[0], dataclasses.replace(params, output_kind=RequestOutputKind.DELTA))
    )
    for index, want in enumerate(whole.outputs):
        got = [delta.outputs[index] for delta in deltas]
        assert "".join(one.text for one in got) == want.text
        assert sum((list(one.token_ids) for one in got), []) == want.token_ids
        assert sum((one.logprobs for one in got), []) == want.logprobs
        assert got[-1].cumulative_logprob == want.cumulative_logprob
    assert sum((delta.prompt_logprobs for delta in deltas), []) == whole.prompt_logprobs
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert len(deltas) > 5


def test_streams_in_turn_both_end(llm: LLM) -> None:
    wanted = [ids_of(output) for output in llm.generate(PROMPTS[:2], [greedy(3), greedy(9)])]
    short, long = llm.stream(PROMPTS[0], greedy(3)), llm.stream(PROMPTS[1], greedy(9))
    last: dict[int, Any] = {}
    next(long)
    next(short)
    for output in long:  # its steps finish the short one too
        last[1] = output
    for output in short:
        last[0] = output
    assert [ids_of(last[0]), ids_of(last[1])] == wanted
    assert last[0].finished and last[1].finished


def test_generate_inside_a_stream_disturbs_neither(llm: LLM) -> None:
    [want_a], [want_b] = llm.generate(PROMPTS[0], greedy(6)), llm.generate(PROMPTS[1], greedy(12))
    stream = llm.stream(PROMPTS[0], greedy(6))
    next(stream)
    [inside] = llm.generate(PROMPTS[1], greedy(12))
    assert ids_of(inside) == ids_of(want_b)
    *_, last = stream
    assert last.finished and ids_of(last) == ids_of(want_a)


# -- n, seeds, stops


def test_n_outputs_of_one_prompt(llm: LLM) -> None:
    params = SamplingParams(n=10, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    [output] = llm.generate(PROMPTS[0], params)
    assert [one.index for one in output.outputs] == list(range(10))
    assert len({tuple(one.token_ids) for one in output.outputs}) > 5
    assert output.metrics.num_output_tokens == 60
    [alone] = llm.generate(PROMPTS[0], SamplingParams(**{**vars(params), "n": 1}))
    assert ids_of(alone) == ids_of(output)


def test_a_seed_repeats_and_none_differs(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, seed=9, max_tokens=12, ignore_eos=True)
    free = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([PROMPTS[0]] * 6, [seeded, free, free, seeded, free, free])
    tokens = [tuple(ids_of(output)) for output in outputs]
    assert tokens[0] == tokens[3]
    assert len(set(tokens)) == 5


def test_without_max_tokens_it_runs_to_the_end_of_the_context(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    for asked in (None, 10_000):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=asked)
        [output] = llm.generate(PROMPTS[0], params)
        assert len(ids) + len(ids_of(output)) == 128
        assert output.outputs[0].finish_reason == "length"
    assert llm.generate([5] * 127, greedy(9))[0].outputs[0].finish_reason == "length"


def test_the_models_end_token_stops_it(llm: LLM) -> None:
    eos = SamplingParams(temperature=0.0, logit_bias={2: 100.0}, max_tokens=5)
    [output] = llm.generate(PROMPTS[0], eos)
    one = output.outputs[0]
    assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == ([2], "", "stop", None)
    [output] = llm.generate(PROMPTS[0], SamplingParams(**{**vars(eos), "ignore_eos": True}))
    assert ids_of(output) == [2] * 5 and output.outputs[0].finish_reason == "length"
    [output] = llm.generate(PROMPTS[0], SamplingParams(**{**vars(eos), "min_tokens": 3}))
    assert len(ids_of(output)) == 4 and ids_of(output)[3] == 2 and 2 not in ids_of(output)[:3]


def test_a_stop_token_ends_it_and_is_no_part_of_the_text(llm: LLM) -> None:
    [free] = llm.generate(PROMPTS[0], greedy(12))
    tokenizer, ids = llm.get_tokenizer(), ids_of(free)
    place = next(i for i, one in enumerate(ids) if i >= 3 and one not in ids[:i])
    asked = {"stop_token_ids": [ids[place]]}
    [output] = llm.generate(PROMPTS[0], greedy(12, **asked))
    one = output.outputs[0]
    assert (one.token_ids, one.finish_reason, one.stop_reason) == (
        ids[: place + 1],
        "stop",
        ids[place],
    )
    shown = len(tokenizer.decode(ids[:place], skip_special_tokens=True))
    assert one.text == text_of(free)[: len(one.text)] and abs(len(one.text) - shown) <= 1
    assert tokenizer.token_text(ids[place]) not in one.text[shown - 1 :]
    [kept] = llm.generate(PROMPTS[0], greedy(12, include_stop_str_in_output=True, **asked))
    assert kept.outputs[0].text == one.text + tokenizer.token_text(ids[place])
    [late] = llm.generate(PROMPTS[0], greedy(12, min_tokens=place + 1, **asked))
    assert ids[place] not in ids_of(late)[: place + 1]


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_that_straddles_tokens(llm: LLM, included: bool) -> None:
    [free] = llm.generate(PROMPTS[0], greedy(16))
    text, pieces = text_of(free), [llm.get_tokenizer().token_text(one) for one in ids_of(free)]
    ends = np.cumsum([len(piece) for piece in pieces])
    # From inside the third piece into the sixth: it starts and ends within tokens.
    stop = text[ends[2] - 1 : ends[5] - 1]
    start = text.index(stop)
    params = greedy(16, stop=["never this", stop], include_stop_str_in_output=included)
    seen = list(llm.stream(PROMPTS[0], params))
    one = seen[-1].outputs[0]
    assert one.text == text[: start + len(stop) * included]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    assert (
        len(one.token_ids) == next(i for i, end in enumerate(ends) if end >= start + len(stop)) + 1
    )
    for output in seen:  # nothing is shown that would have to be taken back
        assert one.text.startswith(text_of(output))
    [late] = llm.generate(PROMPTS[0], greedy(16, stop=stop, min_tokens=16))
    assert text_of(late) == text and late.outputs[0].finish_reason == "length"


# -- what is reported


def test_logprobs_follow_vllms_conventions(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.5, seed=3, max_tokens=10, logprobs=4, prompt_logprobs=2, ignore_eos=True
    )
    [output] = llm.generate(PROMPTS[1], params)
    one, ids = output.outputs[0], ids_of(output)
    assert one.logprobs is not None and len(one.logprobs) == 10
    for token_id, entry in zip(ids, one.logprobs, strict=True):
        check_entry(entry, token_id, 4, llm)
    total = sum(entry[token_id].logprob for token_id, entry in zip(ids, one.logprobs, strict=True))
    assert one.cumulative_logprob == pytest.approx(total)
    prompt_ids = output.prompt_token_ids
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt_ids)
    assert output.prompt_logprobs[0] is None
    for token_id, entry in zip(prompt_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        check_entry(entry, token_id, 2, llm)


def check_entry(entry: dict[int, Any], token_id: int, num_top: int, llm: LLM) -> None:
    """The chosen token first, then the most likely by rank; k + 1 of them, or k if it is one."""
    assert next(iter(entry)) == token_id
    chosen, top = entry[token_id], [one for key, one in entry.items() if key != token_id]
    inside = chosen.rank <= num_top
    assert len(entry) == num_top + (not inside)
    ranks = sorted(one.rank for one in entry.values())
    assert ranks == [*range(1, num_top + 1), *([] if inside else [chosen.rank])]
    assert [one.rank for one in top] == sorted(one.rank for one in top)
    assert [one.logprob for one in top] == sorted((one.logprob for one in top), reverse=True)
    assert all(one.logprob <= 0.0 for one in entry.values())
    assert chosen.decoded_token == llm.get_tokenizer().token_text(token_id)


def test_logprobs_zero_reports_the_chosen_alone_and_none_nothing(llm: LLM) -> None:
    some, none = llm.generate([[5, 6]] * 2, [greedy(3, logprobs=0, prompt_logprobs=0), greedy(3)])
    assert [list(entry) for entry in some.outputs[0].logprobs or ()] == [[i] for i in ids_of(some)]
    assert some.prompt_logprobs is not None and list(some.prompt_logprobs[1] or ()) == [6]
    assert none.outputs[0].logprobs is none.outputs[0].cumulative_logprob is None
    assert none.prompt_logprobs is None
    [lonely] = llm.generate([5], greedy(1, prompt_logprobs=3))
    assert lonely.prompt_logprobs == [None]


def test_the_metrics_are_ordered(llm: LLM) -> None:
    llm.reset_prefix_cache()
    outputs = llm.generate([[5 + i] * 20 for i in range(20)], greedy(6))
    for output in outputs:
        m = output.metrics
        assert m.first_scheduled_time and m.first_token_time and m.finished_time
        assert m.arrival_time <= m.first_scheduled_time < m.first_token_time < m.finished_time
        assert m.queue_s is not None and m.ttft_s and m.tpot_s and m.e2e_s
        assert 0.0 <= m.queue_s < m.ttft_s < m.e2e_s
        assert m.tpot_s == pytest.approx((m.e2e_s - m.ttft_s) / 5)
        assert (m.num_prompt_tokens, m.num_output_tokens, m.num_cached_tokens) == (20, 6, 0)
    assert outputs[-1].metrics.queue_s > outputs[0].metrics.queue_s  # 8 slots for 20


# -- sampling features


def test_every_sampling_feature_at_once_compiles_nothing(llm: LLM) -> None:
    everything = SamplingParams(
        n=2, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2, temperature=0.9,
        top_p=0.9, top_k=40, min_p=0.01, seed=1, stop=["zzz"], stop_token_ids=[77], max_tokens=9,
        bad_words=["the", "once upon"], min_tokens=2, logprobs=20, prompt_logprobs=20,
        logit_bias={5: -3.0, 9: 2.5}, include_stop_str_in_output=True, skip_special_tokens=False,
    )  # fmt: skip
    mixed = [everything, GREEDY, greedy(4, allowed_token_ids=[5, 6]), SamplingParams(max_tokens=3)]
    outputs = llm.generate([PROMPTS[0]] * 8, mixed * 2)
    assert all(output.finished for output in outputs)
    assert llm.engine.num_late_compiles == 0  # late_compile="error" would have raised, besides


def test_allowed_ids_bias_and_bad_words_are_honoured(llm: LLM) -> None:
    [free] = llm.generate(PROMPTS[0], greedy(8))
    word = llm.get_tokenizer().token_text(ids_of(free)[1]).strip()
    allowed, biased, banned, two = llm.generate(
        [PROMPTS[0]] * 4,
        [
            greedy(8, allowed_token_ids=[50, 60, 70]),
            greedy(3, logit_bias={99: 100.0}),
            greedy(8, bad_words=[word]),
            greedy(8, bad_words=[text_of(free).split()[0] + " " + text_of(free).split()[1]]),
        ],
    )
    assert set(ids_of(allowed)) <= {50, 60, 70}
    assert ids_of(biased) == [99] * 3
    assert ids_of(free)[1] not in ids_of(banned)
    assert ids_of(two)[:1] == ids_of(free)[:1] and ids_of(two)[1] != ids_of(free)[1]


# Spellings by single letters: the tokenizer's own are longer, so none of these is banned at first.
LETTERS, FOUND = "adegn", ["ad", "nag", "ee"]


def letters_run(llm: LLM, **params: Any) -> SamplingParams:
    ids = [llm.get_tokenizer().token_id(letter) for letter in LETTERS]
    common = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True, "logprobs": 1}
    return SamplingParams(seed=4, allowed_token_ids=ids, **common, **params)


def test_a_bad_word_does_not_appear_however_it_is_spelled(llm: LLM) -> None:
    free, banned = (
        llm.generate(PROMPTS[1], letters_run(llm, n=3, bad_words=words))[0].outputs
        for words in ([], FOUND)
    )
    for before, after in zip(free, banned, strict=True):
        start = min(end for word in FOUND if (end := before.text.find(word)) >= 0)
        assert after.text[: start + 1] == before.text[: start + 1]  # the same up to there
        assert not any(word in after.text for word in FOUND)
        assert len(after.token_ids) == len(after.logprobs) == len(after.text) == 40
    assert len({one.text for one in banned}) == 3


def test_bad_words_are_kept_in_a_crowd_and_in_a_stream(llm: LLM) -> None:
    params = letters_run(llm, bad_words=FOUND)
    [alone] = llm.generate(PROMPTS[1], params)
    crowd = llm.generate([PROMPTS[1]] + PROMPTS * 5, [params] + [GREEDY, params, GREEDY] * 5)
    assert ids_of(crowd[0]) == ids_of(crowd[2]) == ids_of(alone)
    assert text_of(crowd[1]) == text_of(llm.generate(PROMPTS[0], GREEDY)[0])
    texts = [text_of(output) for output in llm.stream(PROMPTS[1], params)]
    assert texts[-1] == text_of(alone)
    assert all(one == texts[-1][: len(one)] for one in texts)


def test_bad_words_that_leave_no_way_to_go_on_end_their_request(llm: LLM) -> None:
    params = letters_run(llm, bad_words=["ll"]).replace(
        allowed_token_ids=[llm.get_tokenizer().token_id("l")]
    )
    refused, other = llm.generate(PROMPTS[:2], [params, GREEDY], on_error="return")
    assert isinstance(refused.error, RequestError) and text_of(refused) == "l"
    assert "ends no bad word" in str(refused.error)
    assert other.error is None and text_of(other) == text_of(llm.generate(PROMPTS[1], GREEDY)[0])
    with pytest.raises(RequestError, match="^prompt 1: .* ends no bad word"):
        llm.generate(PROMPTS[:2], [greedy(1), params])


# -- failures, interruptions and the end


def broken_for(first_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every token of the request whose prompt begins so fail on the host."""
    accept = Completion._append_token

    def fail(self: Completion, token_id: int) -> None:
        if self.request.prompt_ids[0] == first_id and len(self.sequence.output_ids) == 2:
            raise UnicodeError("the detokenizer broke")
        accept(self, token_id)

    monkeypatch.setattr(Completion, "_append_token", fail)


def test_a_failure_inside_one_request_ends_that_one_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [ids_of(output) for output in llm.generate([[5], [6], [7]], GREEDY)]
    broken_for(6, monkeypatch)
    one, failed, other = llm.generate([[5], [6], [7]], GREEDY, on_error="return")
    assert [ids_of(one), ids_of(other)] == [wanted[0], wanted[2]]
    assert isinstance(failed.error, UnicodeError) and failed.finished
    assert failed.outputs[0].finish_reason == "error" and ids_of(failed) == wanted[1][:2]
    assert failed.metrics.e2e_s is not None
    # Frames would keep a step's arrays on the device for as long as somebody keeps the output.
    assert failed.error.__traceback__ is None
    assert "detokenizer broke" in failed.error.__notes__[0]
    with pytest.raises(UnicodeError, match="the detokenizer broke"):
        llm.generate([[5], [6], [7]], GREEDY)
    with pytest.raises(UnicodeError, match="the detokenizer broke"):
        list(llm.stream([6], GREEDY))
    completed = dict(llm.as_completed([[5], [6]], GREEDY, on_error="return"))
    assert completed[0].error is None and completed[1].error is not None
    with pytest.raises(UnicodeError, match="the detokenizer broke"):
        dict(llm.as_completed([[5], [6]], GREEDY))


def test_a_request_whose_second_output_fails_counts_as_an_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Completion._append_token

    def fail(self: Completion, token_id: int) -> None:
        if self.sequence.index == 1 and len(self.sequence.output_ids) == 3:
            raise UnicodeError("the detokenizer broke")
        accept(self, token_id)

    monkeypatch.setattr(Completion, "_append_token", fail)
    before = llm.metrics().num_finished
    [output] = llm.generate([[5]], greedy(3, n=2), on_error="return")
    after = llm.metrics().num_finished
    assert output.error is not None and output.outputs[0].finish_reason == "length"
    assert after["error"] == before.get("error", 0) + 1
    assert after.get("length") == before.get("length")


def test_ctrl_c_in_the_middle_leaves_a_whole_engine(llm: LLM) -> None:
    wanted = ids_of(llm.generate(PROMPTS[0], GREEDY)[0])
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate(PROMPTS * 20, greedy(100))
    finally:
        timer.join()
        signal.signal(signal.SIGINT, previous)
    assert not llm.engine.scheduler.has_work
    assert ids_of(llm.generate(PROMPTS[0], GREEDY)[0]) == wanted


def test_a_program_that_compiles_late_raises_and_leaves_a_whole_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ids_of(llm.generate(PROMPTS[0], GREEDY)[0])
    admit = llm.engine._admit

    def compile_and_admit(admitted: Any) -> None:
        jax.jit(lambda a: a * 3.5)(jnp.zeros(3))
        admit(admitted)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine, "_admit", compile_and_admit)
        with pytest.raises(RuntimeError, match="nothing may compile after warm-up; got . compilat"):
            llm.generate(PROMPTS[0], GREEDY)
    assert llm.engine.num_late_compiles > 0
    llm.engine._guard.num_late = 0
    assert ids_of(llm.generate(PROMPTS[0], GREEDY)[0]) == wanted


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_close_frees_the_device_for_another_model_and_refuses_use() -> None:
    sizes = []
    for _ in range(2):
        before = live_bytes()
        with LLM(**SMALL) as llm:
            sizes.append(live_bytes() - before)
            stream = llm.stream(PROMPTS[0], greedy(50))
            next(stream)  # a step is in flight when it closes
        assert live_bytes() <= before
        assert next(stream).outputs[0].finish_reason == "abort"
    assert sizes[0] == sizes[1] > 4 * llm.engine.model.num_parameters
    llm.close()
    for use in (
        lambda: llm.generate("x"),
        lambda: next(llm.stream("x")),
        lambda: next(llm.as_completed("x")),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(
            RuntimeError, match="the engine must be running; got: it was closed. Mak"
        ):
            use()


def test_a_step_that_breaks_stops_the_engine_and_close_still_frees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = live_bytes()
    llm = LLM(**SMALL)
    told: list[Exception] = []
    monkeypatch.setattr(llm.engine.runner, "fail", told.append)
    monkeypatch.setattr("jinfer.engine.engine.pack", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate("x", GREEDY)
    assert list(map(type, told)) == [ZeroDivisionError]
    with pytest.raises(
        RuntimeError, match="got: a step failed with ZeroDivisionError: .*Make a ne"
    ):
        llm.generate("x", GREEDY)
    llm.close()
    assert live_bytes() == before


def test_an_engine_that_is_not_made_in_the_end_frees_what_it_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = live_bytes()
    monkeypatch.setattr("jinfer.engine.pacing.Pacing.time_programs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LLM(**SMALL)
    assert live_bytes() == before


def test_a_refused_request_id(llm: LLM) -> None:
    request = llm.prepare(llm.render([{"role": "user", "content": "x"}]), GREEDY, request_id="same")
    llm.engine.add(request)
    with pytest.raises(RequestError, match="must be unique; got request_id='same' twice"):
        llm.engine.add(request)
    assert llm.engine.abort("same") is request and llm.engine.abort("same") is None
    assert request.output().outputs[0].finish_reason == "abort"
    assert request.output().metrics.e2e_s is not None
