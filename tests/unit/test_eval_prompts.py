import json
from pathlib import Path

import pytest

from apparate_llm.eval.prompts import (
    BUILT_IN,
    DEVELOPED_WITH,
    FOLDER,
    HELD_OUT,
    NUM_HELD_OUT,
    Prompt,
    developed_with,
    held_out,
    load_prompts,
    prompt_set,
)


def test_prompt_files_of_every_kind(tmp_path):
    path = tmp_path / "p.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [{"prompt": "p"}, {"turns": ["t1", "t2"], "category": "x"}, {"messages": chat}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    prompts = load_prompts(path)
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["p", "t1", "u"]
    assert [prompt.category for prompt in prompts] == [None, "x", None]


def test_references_come_as_texts_lists_and_lists_of_lists(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"prompt": "p", "reference": given} for given in ("r", ["r", "s"], [["r"]], [], None)]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [prompt.reference for prompt in load_prompts(path)] == ["r", "r", "r", None, None]


def test_sharegpt_chats_give_what_was_asked_first(tmp_path):
    path = tmp_path / "chats.json"
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "ask"}, {"from": "gpt", "value": "answer"}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[2:]}]))
    assert [prompt.messages for prompt in load_prompts(path)] == [[{"role": "user", "content": "ask"}]]


def test_other_files_hold_a_prompt_per_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n\n two \n")
    assert [prompt.messages[0]["content"] for prompt in load_prompts(path)] == ["one", "two"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets_load_by_name_and_ask_nothing_twice(name):
    prompts = load_prompts(Path(name))
    assert len(prompts) == len((FOLDER / f"{name}.jsonl").read_text().splitlines()) >= 16
    asked = [prompt.messages[0]["content"] for prompt in prompts]
    assert len(set(asked)) == len(asked)
    assert prompts == load_prompts(FOLDER / f"{name}.jsonl")


def test_prompts_to_warm_up_with_are_in_no_set_that_is_measured():
    shipped = [prompt for name in BUILT_IN for prompt in load_prompts(Path(name))]
    own = load_prompts(HELD_OUT)
    assert len(own) == NUM_HELD_OUT and {path.stem for path in FOLDER.glob("*.jsonl")} == {*BUILT_IN, HELD_OUT.stem}
    texts = {prompt.messages[0]["content"] for prompt in own}
    assert len(texts) == NUM_HELD_OUT and not texts & {prompt.messages[0]["content"] for prompt in shipped}
    assert held_out(shipped) == own
    asked = [*shipped, *own[:13]]  # a file that holds most of them
    assert held_out(asked) == [own[13 + number % 3] for number in range(NUM_HELD_OUT)]
    with pytest.raises(ValueError, match=r"the prompts hold all of held_out\.jsonl"):
        held_out(own)


@pytest.mark.parametrize("name", BUILT_IN)
def test_prompts_that_were_in_use_while_developing_are_labelled_whatever_file_they_are_in(name, tmp_path):
    assert prompt_set(Path(name), None).described()["developed_with"] == len(load_prompts(Path(name)))
    path = tmp_path / "half.jsonl"
    lines = (FOLDER / f"{name}.jsonl").read_text().splitlines()[::2]
    path.write_text("\n".join([*lines, '{"prompt": "one of my own"}']))
    prompts = prompt_set(path, None)
    assert prompts.name == "half.jsonl"
    assert prompts.described() == {"size": len(lines) + 1, "asked": len(lines) + 1, "developed_with": len(lines)}
    assert prompt_set(path, 3).described() == {"size": len(lines) + 1, "asked": 3, "developed_with": 3}


def test_prompts_of_a_users_own_have_no_label_and_those_of_the_half_of_spec_bench_have_one():
    asked = (
        "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences and "
        "must-see attractions."
    )
    mine, theirs = ([Prompt([{"role": "user", "content": text}])] for text in ("What is new?", asked))
    assert developed_with(mine) == 0 and developed_with(theirs) == 1
    assert developed_with(load_prompts(HELD_OUT)) == 0
    digests = json.loads(DEVELOPED_WITH.read_text())["half of Spec-Bench"]
    assert len(set(digests)) == len(digests) > 200


def test_a_set_that_is_not_there_names_the_built_in_ones():
    with pytest.raises(ValueError, match="built-in sets: chat, code, copy, quick"):
        load_prompts(Path("poems"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object, got list"),
        ('{"text": "x"}', "needs one of turns, prompt, messages; got text"),
        ('{"prompt": 3}', "must be a text"),
        ('{"prompt": ""}', "not empty"),
        ('{"turns": []}', "at least one"),
        ('{"prompt": "\\ud83d', "not JSON"),
        pytest.param('{"prompt": ' + "1" * 5000 + "}", "not JSON", id="many digits"),
        pytest.param("[" * 99_999, "not JSON", id="nested"),
        ('{"prompt": "a", "tests": 3}', "`tests` must be a text"),
        ('{"turns": "a"}', "must be a list"),
        ('{"turns": [["a"]]}', "must be a text"),
        ('{"messages": "a"}', "role and content"),
        ('{"messages": []}', "role and content"),
        ('{"messages": ["a"]}', "role and content"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": [{"role": 3, "content": "a"}]}', "a role must be a text, got int"),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            "a content must be a text, a list of parts or null, got int",
        ),
        ('{"messages": [{"role": "user", "content": {"text": "a"}}]}', "a list of parts or null, got dict"),
    ],
)
def test_bad_prompt_lines_are_named(tmp_path, line, says):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=says) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(("name", "text"), [("p.jsonl", "\n"), ("p.jsonl", ""), ("p.json", "[]"), ("p.txt", " \n")])
def test_an_empty_prompt_file_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="no prompts in"):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["{", "3", '{"a": 1}', "[1]", '[{"conversations": 3}]', pytest.param("[" * 99_999, id="nested")]
)
def test_bad_sharegpt_files_are_named(text, tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="chats") as error:
        load_prompts(path)
    assert str(error.value).startswith(str(path))


def test_words_are_found_in_every_kind_of_content_and_counted_as_such(tmp_path):
    path = tmp_path / "p.jsonl"
    contents = ["a", [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}], [{"type": "image_url"}], None]
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": c}]}) + "\n" for c in contents))
    prompts = prompt_set(path, None)
    assert [prompt.asked for prompt in prompts.prompts] == ["a", "b\nc", "", ""]
    assert prompts.described()["developed_with"] == 0 and held_out(prompts.prompts) == load_prompts(HELD_OUT)


def test_a_prompt_that_no_request_can_hold_is_numbered_for_servers_and_left_to_others(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": "half \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl: prompt 2 has half of a surrogate pair, which cannot be sent"):
        prompt_set(path, None)
    assert len(load_prompts(path)) == 2
