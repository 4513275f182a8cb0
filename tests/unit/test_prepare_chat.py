"""The chat format of models that this project never saw: what they are asked, and what is left out."""

import base64
import json
import logging

import pytest

from apparate_llm.prepare.chat import BREAK, ChatFormat, LeftOut
from apparate_llm.prepare.prompts import KINDS, Prompt, PromptSource
from apparate_llm.prepare.rows import TEST, TRAIN, VALIDATION
from apparate_llm.prepare.store import RowStore
from apparate_llm.prepare.topics import NEXT_TURNS, NEXT_TURNS_ON_CODE

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
IN_TURN = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
CONCATENATED = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def letters(template=None, *, bos=False, special=True, **settings):
    """A tokenizer with a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if special:
        tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names, **settings)


def rendered(tokenizer, messages, **settings):
    """The prompt as text."""
    chat = ChatFormat(tokenizer, max_model_len=2048, **settings)
    return tokenizer.decode(chat.render(messages))


def why(tokenizer, messages, **settings):
    with pytest.raises(LeftOut) as error:
        ChatFormat(tokenizer, **{"max_model_len": 2048, **settings}).render(messages)
    return str(error.value)


def test_a_prompt_is_what_the_template_makes_of_it():
    assert rendered(letters(CHATML), [system("Be brief."), user(" Hi \n")]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (NO_SYSTEM, [system("a"), user("b")], "the chat template refuses (System role not supported)"),
        (IN_TURN, [user("a"), user("b")], "the chat template refuses (Roles must alternate)"),
        (CONCATENATED, [{"role": None, "content": "a"}], "the chat template refuses (can only concatenate str"),
        (CHATML, [user([{"type": "image_url", "image_url": {}}])], "with content that is no text"),
        (CHATML, [user(7)], "with content that is no text"),
        (CHATML, [user("half \ud83d")], "the tokenizer refuses ("),
        (CHATML, [], "the chat template refuses ("),
        (CHATML, [user("a" * 3000)], "longer than 1,920 tokens"),
        (None, [user("")], "shorter than 2 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_left_out_for_a_reason(template, messages, reason):
    assert why(letters(template), messages, max_answer_tokens=128).startswith(reason)


def test_those_left_out_are_counted_in_one_line():
    lines = []
    chat = ChatFormat(letters(IN_TURN), max_model_len=2048, max_answer_tokens=128, say=lines.append)
    prompts = [[user("a"), user("b")], [user("fine")], [user("c"), user("d")], [user("e" * 2000)]]
    asked, left_out = chat.render_all(prompts)
    assert [number for number, _ in asked] == [1] and asked[0][1] == chat.render(prompts[1])
    assert dict(left_out.counts) == {"the chat template refuses": 2, "longer than 1,920 tokens": 1}
    assert lines == [
        "3 of 4 prompts left out: 2 the chat template refuses (Roles must alternate), 1 longer than 1,920 tokens"
    ]
    with pytest.raises(ValueError, match="no prompt is left: 2 of 2 prompts left out: 2 the chat"):
        chat.render_all(prompts[:1] * 2)
    assert chat.render_all([])[0] == []


@pytest.mark.parametrize("length", [16, 512, 10**30])
def test_the_engines_context_counts_and_no_length_of_the_tokenizers(length, caplog):
    tokenizer = letters(CHATML, model_max_length=length)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        chat = ChatFormat(tokenizer, max_model_len=2048)
        ids = chat.render([user("a" * 1500)])
        assert len(chat.encode("b" * 3000)) == 3000
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert ids.count(ids[len(ids) // 2]) >= 1500
    assert not caplog.records


def test_answers_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match=r"answers of 4,096 tokens leave no room.*context has 2,048"):
        ChatFormat(letters(CHATML), max_model_len=2048, max_answer_tokens=4096)


# ---- contents


def test_a_list_of_texts_is_asked_as_a_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert rendered(letters(CHATML), [user(parts)]) == rendered(letters(CHATML), [user("one\ntwo")])


def test_a_template_that_wants_parts_gets_parts():
    tokenizer = letters(PARTS)
    expected = "<|im_start|>user\nhello<|im_end|>\n"
    assert (
        rendered(tokenizer, [user("hello")])
        == rendered(tokenizer, [user([{"type": "text", "text": "hello"}])])
        == expected
    )
    assert ChatFormat(tokenizer, max_model_len=99).affixes() == ("<|im_start|>user\n", "<|im_end|>\n")


def test_prompts_of_the_user_are_split_whatever_their_content_is():
    from apparate_llm.prepare.splits import splits_of_prompts

    parts = [{"type": "text", "text": "one"}, {"type": "image_url"}]
    prompts = [[user("one")], [user(parts)], [user(None)], [user(7)]]
    first, second, *_ = splits_of_prompts(prompts, "0")
    assert first == second  # the same words


def test_no_content_is_an_empty_one():
    assert "None" not in rendered(letters(CHATML), [user("a"), {"role": "assistant", "content": None}, user("b")])


# ---- models without a template


@pytest.mark.parametrize(
    "template",
    [None, {"rag": CHATML, "tool_use": CHATML}, [{"name": "rag", "template": CHATML}], "nothing of it", "{% if"],
)
@pytest.mark.parametrize("bos", [False, True])
def test_without_a_template_that_can_be_used_prompts_are_paragraphs(template, bos):
    lines = []
    tokenizer = letters(bos=bos)
    tokenizer.chat_template = template
    first = "<s>" if bos else ""
    assert rendered(tokenizer, [user("What is a cat?")]) == f"{first}What is a cat?\n\n"
    assert rendered(tokenizer, [system("Be brief."), user("Hi")], say=lines.append) == f"{first}Be brief.\n\nHi\n\n"
    assert rendered(tokenizer, [user("def f():\n")]) == f"{first}def f():\n"
    assert len(lines) == 1 and "prompts are plain text" in lines[0]
    chat = ChatFormat(tokenizer, max_model_len=99)
    assert chat.affixes() == (first, BREAK) and chat.affixes("Be brief.") == (f"{first}Be brief.\n\n", BREAK)
    assert chat.encode(first + "Hi" + BREAK) == chat.render([user("Hi")])


def test_of_several_templates_the_default_one_is_used():
    tokenizer = letters()
    tokenizer.chat_template = {"rag": "", "default": CHATML}
    assert rendered(tokenizer, [user("a")]) == rendered(letters(CHATML), [user("a")])
    tokenizer.chat_template = [{"name": "default", "template": CHATML}]
    assert rendered(tokenizer, [user("a")]) == rendered(letters(CHATML), [user("a")])


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_in_a_file_of_its_own_is_found(name, tmp_path):
    from transformers import AutoTokenizer

    letters().save_pretrained(tmp_path)
    (tmp_path / name).write_text(CHATML if name.endswith("jinja") else json.dumps({"chat_template": CHATML}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert rendered(tokenizer, [user("a")]) == rendered(letters(CHATML), [user("a")])
    (tmp_path / "chat_template.json").write_text("damaged")
    assert rendered(AutoTokenizer.from_pretrained(tmp_path), [user("a")])


# ---- affixes, and how prompts that the model writes begin and end


@pytest.mark.parametrize(
    "content", ["m.content", "m.content | trim", "m.content | upper", "m.content.split('</think>')[-1].lstrip('\n')"]
)
def test_the_text_around_the_users_words_is_found_whatever_the_template_makes_of_them(content):
    chat = ChatFormat(letters(CHATML.replace("m.content", content)), max_model_len=99)
    assert chat.affixes() == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def test_a_refused_system_prompt_is_done_without_and_one_that_is_wanted_is_given():
    chat = ChatFormat(letters(NO_SYSTEM), max_model_len=99)
    assert chat.affixes("Be brief.") == chat.affixes()
    wanted = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    chat = ChatFormat(letters(wanted), max_model_len=99)
    assert not chat.is_plain and "assistant" in chat.affixes()[0]
    assert "Be brief." in chat.affixes("Be brief.")[0]


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, IN_TURN])
def test_the_next_turn_is_what_the_template_makes_of_it(template):
    tokenizer = letters(template)
    chat = ChatFormat(tokenizer, max_model_len=2048)
    before, after = chat.affixes()
    answer = [*tokenizer.encode("four"), *tokenizer.encode("<|im_end|>")]
    assert chat.can_go_on(answer)
    ids = chat.encode(f"{before}2 + 2?{after}") + answer + chat.next_turn("Why?")
    whole = [user("2 + 2?"), {"role": "assistant", "content": "four"}, user("Why?")]
    assert tokenizer.decode(ids) == rendered(tokenizer, whole)


def test_an_answer_that_was_cut_off_is_not_gone_on_with():
    tokenizer = letters(CHATML)
    chat = ChatFormat(tokenizer, max_model_len=2048)
    assert not chat.can_go_on(tokenizer.encode("four")) and not chat.can_go_on([])


@pytest.mark.parametrize(
    "template",
    [
        None,
        CONCATENATED,  # does not say where an answer starts
        "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML,
        "<|im_start|>{{ messages[-1].content }}<|im_end|>\n",  # forgets the turns before
    ],
)
def test_where_a_template_has_no_next_turn_there_is_none(template):
    tokenizer = letters(template)
    chat = ChatFormat(tokenizer, max_model_len=2048)
    assert not chat.can_go_on(tokenizer.encode("four<|im_end|>"))


@pytest.mark.parametrize(
    ("template", "special"), [(None, False), (None, True), (CHATML, True), ("{{ messages[-1].content }}", False)]
)
def test_there_is_always_something_for_a_prompt_to_start_with(template, special):
    chat = ChatFormat(letters(template, special=special), max_model_len=99)
    before, _ = chat.affixes()
    ids = chat.start(before)
    assert ids and all(isinstance(token, int) and token >= 0 for token in ids)
    assert chat.start(before + "What is") == chat.encode(before + "What is")


def test_the_users_words_end_where_the_text_after_them_begins():
    chat = ChatFormat(letters(CHATML), max_model_len=99)
    assert chat.stops(chat.affixes()[1]) == {"stop_token_ids": chat.encode("<|im_end|>")}
    assert chat.stops(" [/INST] ") == {"stop": ["[/INST]"]}
    assert chat.stops(BREAK) == {"stop": [BREAK]} and chat.stops("") == {}


@pytest.mark.parametrize(("code", "expected"), [(0.0, 0.06), (0.6, 0.55), (1.0, 0.86)])
def test_a_model_that_asks_itself_for_code_is_asked_for_code(code, expected, tmp_path):
    """By its answers where it may ask what it likes; kept over a restart."""
    tokenizer = letters(CHATML)
    chat = ChatFormat(tokenizer, max_model_len=2048)
    source = PromptSource(chat, user_prompts=[], seed=0)
    for number in range(80):
        answer = tokenizer.encode("```python" if number < 80 * code else "words")
        source.answered(Prompt(tokenizer.encode("a"), 0, TRAIN, is_free=True), answer)
        source.answered(Prompt(tokenizer.encode("b"), 0, TRAIN), tokenizer.encode("```"))  # not its own choice
    store = RowStore(tmp_path)
    store.append([], **source.facts())
    again = PromptSource(chat, user_prompts=[], seed=0)
    again.learn(RowStore(tmp_path))
    drawn = [again.draw(number) for number in range(1000)]
    of_code = sum(opening.kind == KINDS.index("code") for opening in drawn)
    assert of_code / len(drawn) == pytest.approx(expected, abs=0.06)


def test_answers_are_gone_on_with_in_their_own_split_and_about_code_where_they_hold_code():
    tokenizer = letters(CHATML)
    source = PromptSource(ChatFormat(tokenizer, max_model_len=2048), user_prompts=[], seed=0)
    before = {}
    for split in (TRAIN, VALIDATION, TEST):
        for words in ("plain", "```python"):
            prompt, answer = tokenizer.encode(f"{split} {words}"), tokenizer.encode(f"{words}<|im_end|>")
            source.answered(Prompt(prompt, 0, split), answer)
            before[tuple(prompt + answer)] = split, "```" in words
    cut_off = Prompt(tokenizer.encode("cut off"), 0, TRAIN)
    source.answered(cut_off, tokenizer.encode("in the mid"))
    seen = set()
    for number in range(300):
        drawn = source.draw(number)
        if isinstance(drawn, Prompt):
            (key,) = (key for key in before if tuple(drawn.ids[: len(key)]) == key)
            split, is_code = before[key]
            turn = tokenizer.decode(drawn.ids[len(key) :])
            assert drawn.split == split and not drawn.is_free
            assert any(words in turn for words in (NEXT_TURNS_ON_CODE if is_code else NEXT_TURNS))
            assert key not in seen, "one next turn for each answer"
            seen.add(key)
    assert seen == before.keys()


# ---- mistral-common


def tekken(folder):
    """vLLM's tokenizer of a Mistral folder with a token for each byte, its seventh version."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from vllm.tokenizers.mistral import MistralTokenizer

    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": chr(i)} for i in range(256)]
    special = list(Tekkenizer.DEPRECATED_SPECIAL_TOKENS)
    config = {
        "pattern": ".",
        "num_vocab_tokens": 256,
        "default_vocab_size": 256 + len(special),
        "default_num_special_tokens": len(special),
        "version": "v7",
    }
    (folder / "tekken.json").write_text(json.dumps({"vocab": vocab, "special_tokens": special, "config": config}))
    return MistralTokenizer.from_pretrained(str(folder))


def test_a_tokenizer_of_mistral_common_needs_no_template(tmp_path):
    tokenizer = tekken(tmp_path)
    chat = ChatFormat(tokenizer, max_model_len=2048)
    asked = [system("Be brief."), user("Hi [INST]")]
    ids = chat.render(asked)
    assert ids == tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    assert not chat.is_plain and ids[0] == tokenizer.bos_token_id
    before, after = chat.affixes("Be brief.")
    assert chat.encode(f"{before}Hi{after}") == chat.render([system("Be brief."), user("Hi")])
    assert chat.start(chat.affixes()[0])[0] == tokenizer.bos_token_id
    assert chat.stops(after) == {"stop_token_ids": ids[-1:]}
    assert why(tokenizer, [{"role": "judge", "content": "a"}]).startswith("the chat template refuses (")
