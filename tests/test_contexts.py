"""Contexts are made of ids: the query whole, candidates as they were written, and never the target candidate."""

import functools
import os

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as token_models

from gcpo_jax.config import ConfigError, Contexts
from gcpo_jax.contexts import ContextBuilder, read_tokenizer
from gcpo_jax.rollout import _Listing

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROBLEM = "What is 12 + 30?"
OURS = st.lists(st.integers(300, 400), min_size=1, max_size=12)  # ids of no text of a context


@functools.cache
def bpe(template: str | None = None, bos: bool = False):
    """A byte-level BPE tokenizer as Qwen's, small."""
    core = Tokenizer(token_models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        [PROBLEM, "the attempts at this problem\n\n", "</think>\n\nThe answer"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def tiny():
    tokens = ["<pad>", "<q>", "<y>", "<agg>", "<try>", "$", *"0123456789+=?"]
    core = Tokenizer(token_models.WordLevel({t: k for k, t in enumerate(tokens)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(tokens[:6])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="$", pad_token="<pad>")


def builder(tokenizer, end_ids=(2,), prompt="{problem}", **settings) -> ContextBuilder:
    return ContextBuilder(tokenizer, Contexts(**settings), prompt, frozenset(end_ids))


STYLES = {"base": bpe, "base with BOS": lambda: bpe(bos=True), "chat": lambda: bpe(CHATML), "tiny": tiny}


@pytest.fixture(params=STYLES)
def contexts(request):
    made = builder(STYLES[request.param]())
    assert made.style == request.param.split()[0]
    return made


def holds(ids, part):
    return any(ids[k : k + len(part)] == part for k in range(len(ids) - len(part) + 1))


def test_the_style_follows_the_tokenizer_and_an_impossible_one_is_refused():
    assert builder(bpe(CHATML), style="base").style == "base"
    with pytest.raises(ConfigError, match=r"contexts.style='chat': the tokenizer has no chat template"):
        builder(bpe(), style="chat")
    with pytest.raises(ConfigError, match=r"contexts.style='tiny': the tokenizer lacks <q>, <y>, <agg> or <try>"):
        builder(bpe(), style="tiny")


def test_a_template_that_fails_or_hides_the_user_is_refused_at_once():
    with pytest.raises(ConfigError, match="the template refuses a user turn: no users here"):
        builder(bpe("{{ raise_exception('no users here') }}"))
    for template in ("{{ messages|length }}", "{{ messages[0]['content'] * 2 }}"):
        with pytest.raises(ConfigError, match="does not show the user turn once, whole"):
            builder(bpe(template))


def test_tiny_contexts_are_the_separators_and_ids():
    c, ids = builder(tiny()), tiny().convert_tokens_to_ids
    q, y, agg, attempt = ids(["<q>", "<y>", "<agg>", "<try>"])
    problem = ids(["1", "+", "2", "="])
    assert c.query("1+2=") == [q, *problem, attempt]
    assert c.integrate("1+2=", [[300], [301, 302]]) == [q, *problem, y, 300, y, 301, 302, agg]
    assert c.leave_one_out("1+2=", [[300]], [303]) == [q, *problem, y, 300, agg, 303, attempt]


def test_the_text_of_contexts_is_the_template_around_the_text_of_candidates():
    tokenizer = bpe(CHATML)
    c = builder(tokenizer, prompt="Solve: {problem}")
    assert tokenizer.decode(c.query(PROBLEM)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSolve: What is 12 + 30?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    one, two, both = (tokenizer.encode(t) for t in ("I say 41", "it is 42", "42 it is"))
    text = tokenizer.decode(c.leave_one_out(PROBLEM, [one, two], both))
    at = [
        text.index(t)
        for t in ("12 + 30", "### Attempt 1\nI say 41\n", "### Attempt 2\nit is 42\n", "solution\n42 it is\n")
    ]
    assert at == sorted(at) and "below are 2 independent" in text.lower()
    base = builder(bpe(), prompt="{problem}")
    assert bpe().decode(base.integrate(PROBLEM, [one, two])) == (
        "Problem: What is 12 + 30?\n\nAttempt 1:\nI say 41\n\nAttempt 2:\nit is 42\n\n"
        "Careful final solution, using the attempts above:\n"
    )
    assert (
        bpe()
        .decode(base.leave_one_out(PROBLEM, [one], both))
        .endswith("Attempt 1:\nI say 41\n\nCombined solution:\n42 it is\n\nAnother attempt:\n")
    )


@pytest.mark.parametrize("style", STYLES)
def test_in_blocks_an_attempt_is_the_same_whoever_stands_beside_it(style):
    c, plain = builder(STYLES[style](), attention="block"), builder(STYLES[style]())
    parts = [[300], [301, 302], [303]]
    whole, one = c.integrate(PROBLEM, parts), c.leave_one_out(PROBLEM, parts[1:2], [304])
    assert whole.first == one.first == c.integrate(PROBLEM, []).first and whole.blocks[1:2] == one.blocks
    assert [[k for k in block if k >= 300] for block in whole.blocks] == parts
    assert [k for k in whole.ending if k >= 300] == [] and [k for k in one.ending if k >= 300] == [304]
    assert c.query(PROBLEM) == plain.query(PROBLEM)
    text = c.tokenizer.decode([*one], skip_special_tokens=False)
    numbered = plain.tokenizer.decode(plain.leave_one_out(PROBLEM, parts[1:2], [304]), skip_special_tokens=False)
    assert text == numbered.replace("Attempt 1", "Attempt").replace("are 1 independent", "are independent")
    assert list(whole) != plain.integrate(PROBLEM, parts) or style == "tiny"


def test_special_tokens_are_single_ids_and_pieces_tokenise_as_the_whole_text():
    tokenizer = bpe(CHATML)
    c = builder(tokenizer)
    parts = [tokenizer.encode(t) for t in ("I say 41", "it is 42", "42 it is")]
    ids = c.leave_one_out(PROBLEM, parts[:2], parts[2])
    assert ids == tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    messages = [{"role": "user", "content": PROBLEM}]
    assert c.query(PROBLEM) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_the_start_token_stands_first_and_once():
    for c in (builder(bpe(bos=True)), builder(bpe("<s>" + CHATML, bos=True))):
        for ids in (c.query(PROBLEM), c.integrate(PROBLEM, [[300], [301]]), c.leave_one_out(PROBLEM, [[300]], [301])):
            assert ids[0] == 0 and ids.count(0) == 1
    assert 0 not in builder(bpe()).query(PROBLEM)
    assert builder(bpe(bos=True)).query(PROBLEM) == bpe(bos=True).encode(f"Problem: {PROBLEM}\n\nAttempt:\n")


@settings(deadline=None, max_examples=25)
@given(group=st.lists(OURS, min_size=2, max_size=6, unique_by=tuple), integrated=OURS, data=st.data())
@pytest.mark.parametrize("style", STYLES)
def test_x_i_holds_every_other_candidate_as_written_and_never_y_i(style, group, integrated, data):
    c = builder(STYLES[style]())
    target = [*data.draw(st.sampled_from(group)), 500]  # 500 marks the target: no other candidate holds its ids
    group = [g for g in group if g != target[:-1]] + [target]
    order = data.draw(st.permutations(range(len(group))))
    listing = _Listing(list(order), dict(enumerate(group)))
    others = listing.without(len(group) - 1)
    ids = c.leave_one_out(PROBLEM, others, integrated)
    assert 500 not in ids and not holds(ids, target)
    assert [k for k in ids if k >= 300] == [
        k for o in others for k in o
    ] + integrated  # ids as given, in the order given
    bare = [k for k in ids if k < 300]
    assert bare == c.leave_one_out(PROBLEM, [[]] * len(others), [])  # nothing is tokenised anew around them
    assert holds(c.integrate(PROBLEM, listing.without()), target)


@settings(deadline=None, max_examples=25)
@given(
    candidates=st.lists(st.lists(st.integers(300, 400), max_size=40), min_size=1, max_size=5), cap=st.integers(1, 20)
)
@pytest.mark.parametrize("style", STYLES)
def test_candidates_are_cut_to_their_last_tokens_and_the_query_never_is(style, candidates, cap):
    c = builder(STYLES[style](), cap=cap)
    quoted = [c.quote(candidate) for candidate in candidates]
    assert quoted == [candidate[-cap:] for candidate in candidates]
    ids, empty = c.integrate(PROBLEM, quoted), c.integrate(PROBLEM, [[]] * len(candidates))
    assert len(ids) == len(empty) + sum(map(len, quoted))
    assert [k for k in ids if k < 300] == empty
    query = STYLES[style]().encode(PROBLEM.replace(" ", "") if style == "tiny" else "12 + 30", add_special_tokens=False)
    assert style == "tiny" or holds(ids, query)


def test_only_end_ids_at_the_end_are_stripped():
    c = builder(tiny(), end_ids=(0, 5))
    assert c.quote([5, 7, 5, 8, 5, 0]) == [5, 7, 5, 8]
    assert c.quote([5]) == [] == c.quote([])
    candidate = [7, 5]
    c.quote(candidate)
    assert candidate == [7, 5]


@pytest.mark.parametrize("ending", ["</think>", "</think>\n\n", "> </think>"])
def test_the_answer_is_what_follows_the_last_end_of_thinking_however_it_is_tokenised(ending):
    tokenizer = bpe(CHATML)
    thinking, answer = (tokenizer.encode(t) for t in ("<think>so </think> no, so" + ending, "The answer"))
    unfinished = tokenizer.encode("<think>so")
    for text, whole, cut in (
        ("full", thinking + answer, unfinished),
        ("answer", answer, []),
        ("auto", answer, unfinished),
    ):
        c = builder(tokenizer, text=text)
        assert c.quote([*thinking, *answer, 2]) == whole
        assert c.quote(unfinished) == cut
    assert builder(tokenizer, text="answer", cap=2).quote(thinking + answer) == answer[-2:]
    assert builder(tokenizer).quote([*thinking, 2]) == []


def test_a_problem_may_hold_any_text():
    c = builder(bpe(CHATML), prompt="{problem} Go.")
    plain = c.integrate("a b", [[300], [301]])
    assert c.integrate("a\ue000b", [[300], [301]]) == plain  # the mark of a hole
    for problem in ("{problem}", "{{ messages }}", "{% for %}", "é\U0001f600\n\n", "### Attempt 1"):
        assert problem + " Go." in bpe(CHATML).decode(c.query(problem))


def test_what_is_returned_may_be_changed_without_harm(contexts):
    first = contexts.query(PROBLEM)
    copy = list(first)
    first += [1, 2, 3]
    assert contexts.query(PROBLEM) == copy
    assert contexts.integrate(PROBLEM, [[300]]) == contexts.integrate(PROBLEM, [[300]])


@pytest.mark.skipif(
    "GCPO_TOKENIZER" not in os.environ, reason="GCPO_TOKENIZER names no directory of a chat model's tokenizer"
)
def test_a_real_vocabulary_tokenises_contexts_as_whole_texts():
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.environ["GCPO_TOKENIZER"])
    c = builder(tokenizer, end_ids=(tokenizer.eos_token_id,))
    assert c.style == "chat"
    parts = [tokenizer.encode(t, add_special_tokens=False) for t in ("I say \\boxed{41}.", "It is 42", "42")]
    ids = c.leave_one_out(PROBLEM, parts[:2], parts[2])
    assert tokenizer.decode(ids).count("I say \\boxed{41}.") == 1
    messages = [{"role": "user", "content": PROBLEM}]
    assert c.query(PROBLEM) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    # Where a candidate ends in a stop, its line break merges with it in a whole text; nothing else may differ.
    assert abs(len(ids) - len(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False))) <= 2
    assert np.all(np.array(ids) < len(tokenizer))


def test_a_directory_that_names_the_plain_class_is_tokenised_as_its_tokenizer_json_says(tmp_path):
    core = Tokenizer(token_models.WordLevel({"<unk>": 0, " ": 1, "a": 2, "\n": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("a  a\n\na", add_special_tokens=False) == [2, 1, 1, 2, 3, 3, 2]
    assert len(tokenizer) == 4
