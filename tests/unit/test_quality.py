import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apparate_llm.eval import quality
from apparate_llm.eval.quality import final_number, first_difference, is_maths, rouge_l

PROMPTS = Path(quality.__file__).parent / "prompts"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no number at all, only H2O and x^2", None),
        ("so it costs 1,234.50", "1234.5"),
        ("$3", "3"),
        ("-0", "0"),
        ("The answer is 5.", "5"),
        ("5 + 13 = <<5+13=18>>18\n#### 18", "18"),
        ("#### $1,000.00", "1000"),
        ("25% of them, that is 12.50%", "12.5"),
        ("\\boxed{42}", "42"),
        ("**42**", "42"),
        ("100", "100"),
        ("007", "7"),
        (".5", "0.5"),
        ("12,345,678", "12345678"),
        ("1, 2,3", "3"),
        ("about 5km", "5"),
        ("24 m^2", "24"),
        ("24 m^{2}", "24"),
        ("24 m2", "24"),
        ("10^-3", "10"),
        ("1" * 6000, "1" * 6000),
    ],
)
def test_the_last_number_of_a_text_in_one_way_of_writing(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("x = -5", "-5"),
        ("a loss of -$5", "-5"),
        ("$-5", "-5"),
        ("\u22125 degrees", "-5"),
        ("10-5", "5"),
        ("(8)-3", "3"),
        ("on 2024-01-05", "5"),
        ("- 5 apples", "5"),
    ],
)
def test_a_minus_between_two_numbers_is_no_sign(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3/4", "0.75"),
        ("\\(\\frac{3}{4}\\)", "0.75"),
        ("2/6 of the cake", "1/3"),
        ("-1/2", "-0.5"),
        ("= 12/4.", "3"),
        ("20 / 4 = 5", "5"),
        ("5/0", "0"),
        ("01/05/2024", "2024"),
        ("1" * 6000 + "/4", "4"),
    ],
)
def test_a_fraction_counts_by_its_value(text, number):
    assert final_number(text) == number


def test_rouge_l_equals_values_known_by_hand():
    # longest common subsequence "the cat sat": precision 3/3, recall 3/6
    assert rouge_l("The cat sat.", "the cat sat on the mat") == pytest.approx(2 * 1 * 0.5 / 1.5)
    # "a c d" of 4 and 4 words
    assert rouge_l("a b c d", "a c d e") == pytest.approx(0.75)
    assert rouge_l("one two", "three four") == 0.0
    assert rouge_l("", "something") == rouge_l("something", "") == 0.0
    assert rouge_l("Same words!", "same, WORDS") == 1.0


def test_rouge_l_of_equal_texts_is_one_in_every_script():
    assert rouge_l("", "") == rouge_l("?!", "?!") == rouge_l("你好", "你好") == 1.0
    assert rouge_l("größer als", "großer als") == 0.5
    assert rouge_l("Привет, мир", "привет мир!") == 1.0


def test_rouge_l_is_that_of_the_package_for_english():
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"], use_stemmer=False)
    texts = [json.loads(line)["prompt"] for line in (PROMPTS / "quick.jsonl").read_text().splitlines()][:8]
    for text, reference in itertools.pairwise(texts):
        assert text.isascii() and reference.isascii()
        assert rouge_l(text, reference) == theirs.score(reference, text)["rougeL"].fmeasure


def test_rouge_score_is_imported_when_it_is_needed():
    code = "import sys, apparate_llm.eval.quality; print({'rouge_score', 'nltk'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_where_two_texts_part():
    assert first_difference("same", "same") is None
    assert first_difference("", "") is None
    assert first_difference("abc", "abd") == 2
    assert first_difference("abc", "abcd") == first_difference("abcd", "abc") == 3
    assert first_difference("", "x") == first_difference("a", "b") == 0


def test_categories_about_maths():
    assert all(map(is_maths, ("math", "Maths", "math_reasoning", "mathematics", "gsm8k", "GSM8K", "openai/gsm8k")))
    assert not any(map(is_maths, (None, "", "code", "reasoning", "qa", "aftermath")))


def built_in(name):
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "size"), [("code", 60), ("chat", 40), ("copy", 24)])
def test_a_built_in_prompt_set_is_what_its_readers_expect(name, size):
    records = built_in(name)
    assert len(records) == len({record["prompt"] for record in records}) == size
    for record in records:
        assert {"category", "prompt"} <= set(record) <= {"category", "prompt", "reference", "tests"}
        assert all(isinstance(value, str) and value.strip() for value in record.values())


def test_every_maths_prompt_of_the_chat_set_has_a_number_as_reference():
    records = built_in("chat")
    assert {record["category"] for record in records} == {
        "writing", "qa", "reasoning", "maths", "translation", "advice",
    }  # fmt: skip
    references = [record["reference"] for record in records if is_maths(record["category"])]
    assert len(references) >= 8
    assert references == [final_number(reference) for reference in references]


def test_answers_of_the_copy_set_repeat_their_prompts():
    records = built_in("copy")
    assert {record["category"] for record in records} == {"summarisation", "editing", "extraction", "code_editing"}
    for record in records:
        words = re.findall(r"\w+", record["reference"].lower())
        known = set(re.findall(r"\w+", record["prompt"].lower()))
        assert sum(word in known for word in words) / len(words) >= 0.75, record["prompt"]
        assert 75 <= len(record["prompt"].split()) <= 250
