"""Published data sets: for each one its columns, one to three rows in its schema, and what a right reading gives.

The rows are short sentences written for these tests, under the names and with the types of the published columns.
`Published.source` says where the schema was read; a source that begins with "memory" was not looked up.
"""

import json
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What a right reading of the rows gives. Fields that are left empty are not checked.

    Attributes:
        prompt: Texts that the rendered prompt of the first row contains, in this order. System text comes first.
        winner: For each comparison, a text of its better completion, or "tie".
        loser: A text that a worse completion of the first comparison contains.
        margin: Margin of the first pair.
        k: Number of completions of the first comparison.
        votes: Number of votes on the first comparison.
        completion: A text that the last demonstration's completion contains.
        rows: Number of rows that are kept. Demonstrations are counted with `every_turn`.
        tools: A text that the column `tools` of the first row contains.
        template_kwargs: A text that the column `chat_template_kwargs` of the first row contains.
        category_column: Column to pass as `category_column`.
        category: Category of the first row, if `category_column` is passed.
        flag: A flag of the first row.
        present: A text that the prompt or a completion of the first row contains.
        absent: A text that neither the prompt nor a completion of any row contains.
        dropped: A part of the reason for which a row is dropped.
        refused: Column that the refusal names. The set is not read at all.
    """

    prompt: tuple[str, ...] = ()
    winner: tuple[str, ...] = ()
    loser: str = ""
    margin: float | None = None
    k: int | None = None
    votes: int | None = None
    completion: str = ""
    rows: int | None = None
    tools: str = ""
    template_kwargs: str = ""
    category_column: str = ""
    category: str = ""
    flag: str = ""
    present: str = ""
    absent: str = ""
    dropped: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Published:
    """A published data set, or one of its configurations.

    Attributes:
        name: Id on the Hub, name of a file, or name of a documented format.
        kind: "comparisons" or "demonstrations".
        rows: Example rows. Each row has all published columns.
        expect: What a right reading gives.
        source: Where the schema was read.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]
    expect: Expected
    source: str
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.rows[0]))

    @property
    def verified(self) -> bool:
        """Whether the schema was read somewhere, and is not from memory only."""
        return not self.source.startswith("memory")


QUESTION = "Which color is a clear sky?"
SECOND = "How many days has a week?"
GOOD = "A clear sky is blue."
BAD = "No idea."
SYSTEM = "You answer in one sentence."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Looks up the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOLS = json.dumps([TOOL])
CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def system(text: Any) -> Row:
    return {"role": "system", "content": text}


def turn(speaker: str, text: str) -> Row:
    """A turn of a ShareGPT conversation."""
    return {"from": speaker, "value": text}


def part(role: str, text: str) -> Row:
    """A message of LLaMA-Factory's v1 form."""
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": 1.0}


def arena_part(role: str, text: str) -> Row:
    """A message of the arena sets of 2025, whose parts have an empty place for an image."""
    return {"role": role, "content": [{"type": "text", "text": text, "image": None, "mimeType": None}]}


def talk(question: str, answer: str) -> list[Row]:
    return [user(question), assistant(answer)]


def turns(question: str, answer: str, human: str = "human", model: str = "gpt") -> list[Row]:
    return [turn(human, question), turn(model, answer)]


_ASKED = (QUESTION,)
_BETTER = Expected(prompt=_ASKED, winner=(GOOD,), loser=BAD)
_ANSWERED = Expected(prompt=_ASKED, completion=GOOD, rows=1)
_ANSWERED_WITH_SYSTEM = Expected(prompt=(SYSTEM, QUESTION), completion=GOOD, rows=1)
_TWO_TURNS = Expected(prompt=_ASKED, completion="Seven.", rows=2)
_WITH_TOOLS = Expected(prompt=_ASKED, tools="get_weather")


# --- comparisons ------------------------------------------------------------------------------------------------------


def helpsteer(response: str, helpfulness: int) -> Row:
    """A rated answer of HelpSteer and HelpSteer2. All five ratings are between 0 and 4."""
    return {
        "prompt": QUESTION,
        "response": response,
        "helpfulness": helpfulness,
        "correctness": helpfulness,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 1,
    }


def strength(prompt: str, preference: int, first: str, second: str) -> Row:
    """A pair of HelpSteer2's preferences. A negative strength prefers response 1."""
    votes = [{"strength": preference, "justification": "One answers the question.", "improvement": "Say more."}]
    return {
        "split": "train",
        "prompt": prompt,
        "response_1": first,
        "response_2": second,
        "preference_strength": preference,
        "preference_statement": "One response answers the question.",
        "preference_elaboration": "The other response does not.",
        "three_most_similar_preferences": votes,
        "all_preferences_unprocessed": votes,
    }


def helpsteer3(question: str, preference: int, first: str, second: str) -> Row:
    """A pair of HelpSteer3. A negative preference prefers response 1."""
    individual = {
        "score": preference,
        "reasoning": "One response answers the question.",
        "feedback1": "The response is short.",
        "feedback2": "The response is short.",
    }
    return {
        "domain": "general",
        "language": "english",
        "context": [user(question)],
        "response1": first,
        "response2": second,
        "overall_preference": preference,
        "individual_preference": [individual],
    }


def safe_rlhf(better: int, first: str, second: str) -> Row:
    """A pair of PKU-SafeRLHF. The safer response need not be the better one."""
    harms = {"Violence": False, "Privacy Violation": False}
    return {
        "prompt": QUESTION,
        "response_0": first,
        "response_1": second,
        "prompt_source": "Alpaca3-8B",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca3-70B",
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "response_0_harm_category": harms,
        "response_1_harm_category": harms,
        "response_0_severity_level": 0,
        "response_1_severity_level": 0,
        "better_response_id": better,
        "safer_response_id": 1 - better,
        "response_0_sha256": "6f1e",
        "response_1_sha256": "a04b",
    }


def judged(turn_number: int, winner: str) -> Row:
    """A judgment of MT-Bench. Turn 1 judges the first answers, turn 2 the second ones."""
    return {
        "question_id": 81,
        "model_a": "model-x",
        "model_b": "model-y",
        "winner": winner,
        "judge": "expert_1",
        "conversation_a": [*talk(QUESTION, GOOD), *talk(SECOND, "Eight.")],
        "conversation_b": [*talk(QUESTION, BAD), *talk(SECOND, "Seven.")],
        "turn": turn_number,
    }


def expert(question: str, winner: str) -> Row:
    """A vote of arena-expert-5k. Conversations are JSON text."""
    first = talk(question, GOOD)
    second = talk(question, BAD)
    exchange = {"user": user(question), "model_side_a": first[1], "model_side_b": second[1]}
    return {
        "id": "0f2c",
        "model_a": "model-x",
        "model_b": "model-y",
        "winner": winner,
        "conversation_a": json.dumps(first),
        "conversation_b": json.dumps(second),
        "evaluation_order": 1,
        "full_conversation": json.dumps([exchange]),
        "language": "en",
        "occupational_tags": {"mathematical": False, "legal_and_government": False},
    }


def arena_140k(question: str, winner: str) -> Row:
    first = [arena_part("user", question), arena_part("assistant", GOOD)]
    second = [arena_part("user", question), arena_part("assistant", BAD)]
    return {
        "id": "c4b9",
        "model_a": "model-x",
        "model_b": "model-y",
        "winner": winner,
        "evaluation_session_id": "a333",
        "evaluation_order": 1,
        "conversation_a": first,
        "conversation_b": second,
        "full_conversation": [{"user": first[0], "model_side_a": first[1], "model_side_b": second[1]}],
        "conv_metadata": {"sum_assistant_a_tokens": 6, "sum_assistant_b_tokens": 3, "turns": 1},
        "category_tag": {"math_v0.1": {"math": False}},
        "language": "en",
        "is_code": False,
        "timestamp": "2025-05-01 12:00:00",
    }


def battle(winner: str, **further: Any) -> Row:
    """The columns that LMSYS's arena sets of 2023 and 2024 share."""
    return {
        "question_id": "58210e39",
        "model_a": "model-x",
        "model_b": "model-y",
        "winner": winner,
        "conversation_a": talk(QUESTION, GOOD),
        "conversation_b": talk(QUESTION, BAD),
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1,
        **further,
    }


def best_of_k() -> Row:
    """A question of PPE's correctness sets: 32 responses, each right or wrong."""
    responses = {f"response_{number}": f"{BAD} {number}" for number in range(1, 33)}
    responses["response_7"] = GOOD
    scores = [number == 7 for number in range(1, 33)]
    return {
        "question_id": "12",
        "prompt": QUESTION,
        "answer": "blue",
        "model_name": "model-x",
        "scores": scores,
        "parsed_outputs": ["blue" if score else "" for score in scores],
        "mean_score": 0.03125,
        "conflict_pairs": [[6, 0], [1, 6]],
        "sampled_conflict_pairs": [[6, 0], [1, 6]],
        **responses,
    }


def rated_pair(question: str, status: str, chosen_score: float, rejected_score: float) -> Row:
    """A pair of argilla/distilabel-intel-orca-dpo-pairs. `rating` is in the order of `generations`."""
    return {
        "system": SYSTEM,
        "input": question,
        "chosen": GOOD,
        "rejected": BAD,
        "generations": [BAD, GOOD],
        "order": ["rejected", "chosen"],
        "labelling_model": "model-x",
        "labelling_prompt": [system("You compare answers."), user("Compare the two answers.")],
        "raw_labelling_response": "The second answer is right.",
        "rating": [rejected_score, chosen_score],
        "rationale": "The second answer is right.",
        "status": status,
        "original_chosen": GOOD,
        "original_rejected": BAD,
        "chosen_score": chosen_score,
        "in_gsm8k_train": False,
    }


def kto(label: bool, answer: str) -> Row:
    """A row of argilla's KTO sets. The completion is the whole conversation."""
    return {
        "prompt": QUESTION,
        "completion": talk(QUESTION, answer),
        "label": label,
        "rating": 5.0 if label else 1.0,
        "dataset": "argilla/distilabel-capybara-dpo-7k-binarized",
    }


def beaver(answer: str, is_safe: bool) -> Row:
    return {
        "prompt": QUESTION,
        "response": answer,
        "category": {"privacy_violation": not is_safe, "violence,aiding_and_abetting,incitement": False},
        "is_safe": is_safe,
    }


def oasst(message_id: str, parent: str | None, role: str, text: str, rank: int | None) -> Row:
    """A message of oasst1. Rank 0 is the best reply."""
    return {
        "message_id": message_id,
        "parent_id": parent,
        "user_id": "u1",
        "created_date": "2023-02-05T14:23:50",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.001},
        "message_tree_id": "m1",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["quality"], "value": [0.75], "count": [3]},
    }


def node(role: str, text: str, rank: int | None, *replies: Row) -> Row:
    """A message of OASST's tree files, with its replies."""
    return {
        "message_id": f"{role}-{rank}",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "rank": rank,
        "synthetic": False,
        "emojis": {},
        "replies": list(replies),
    }


def annotated(text: str, rating: int) -> Row:
    """A completion of UltraFeedback, with its ratings by aspect."""
    aspect = {"Rating": str(rating), "Rationale": "It answers the question."}
    return {
        "annotations": {
            "helpfulness": aspect,
            "honesty": aspect,
            "instruction_following": aspect,
            "truthfulness": aspect,
        },
        "custom_system_prompt": "You are a helpful assistant.",
        "critique": "The answer is short.",
        "fine-grained_score": float(rating),
        "model": "model-x",
        "overall_score": float(rating),
        "principle": "helpfulness",
        "response": text,
    }


def preference_collection() -> Row:
    """A pair of Preference-Collection: `instruction` and `output` are the judge's prompt and its verdict."""
    return {
        "output": "Response A is better. [RESULT] A",
        "instruction": "###Task Description: compare the two responses by the score rubric.",
        "orig_instruction": QUESTION,
        "orig_response_A": GOOD,
        "orig_response_B": BAD,
        "orig_reference_answer": "Blue.",
        "orig_criteria": "Is the answer right?",
        "orig_score_A": "5",
        "orig_score_B": "2",
        "orig_feedback_A": "The answer is right.",
        "orig_feedback_B": "There is no answer.",
        "orig_feedback": "Response A is better.",
        "orig_preference": "A",
    }


def kto_form(answer: str, kto_tag: bool) -> Row:
    return {"instruction": QUESTION, "input": "", "output": answer, "kto_tag": kto_tag}


COMPARISONS = (
    Published(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        "comparisons",
        (
            {
                "id": "row-1",
                "source": "tulu-3-wildchat",
                "prompt": QUESTION,
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
            },
        ),
        _BETTER,
        "card of allenai/tulu-2.5-preference-data in a public collection, which compares the columns",
    ),
    Published(
        "allenai/reward-bench",
        "comparisons",
        (
            {
                "prompt": QUESTION,
                "chosen": GOOD,
                "chosen_model": "model-x",
                "rejected": BAD,
                "rejected_model": "model-y",
                "subset": "alpacaeval-easy",
                "id": 30,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, category_column="subset", category="alpacaeval-easy"),
        "code that reads it (a loader of reward benchmarks)",
    ),
    Published(
        "allenai/reward-bench-2",
        "comparisons",
        (
            {
                "id": "3",
                "prompt": QUESTION,
                "chosen": [GOOD],
                "rejected": [BAD, "Green.", "Ask later."],
                "num_correct": 1,
                "num_incorrect": 3,
                "total_completions": 4,
                "models": ["model-x", "model-y", "model-y", "model-z"],
                "subset": "Factuality",
                "additional_metadata": {"category": None, "correct": None, "index": None, "instruction_id_list": None},
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, k=4, category_column="subset", category="Factuality"),
        "dataset card on the Hub",
    ),
    Published(
        "allenai/tulu-2.5-preference-data",
        "comparisons",
        ({"chosen": talk(QUESTION, GOOD), "rejected": talk(QUESTION, BAD), "source": "hh-rlhf"},),
        _BETTER,
        "card of the set in a public collection (schema from the datasets server)",
    ),
    Published(
        "Anthropic/hh-rlhf",
        "comparisons",
        (
            {
                "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
                "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
            },
        ),
        _BETTER,
        "file: shared data hh_helpful_train.jsonl, hh_harmless_test.jsonl.gz",
    ),
    Published(
        "argilla/distilabel-capybara-dpo-7k-binarized",
        "comparisons",
        (
            {
                "source": "GeneralKnowledge",
                "conversation": [{"input": QUESTION, "output": "Blue, by day."}],
                "original_response": "Blue, by day.",
                "generation_prompt": [f"USER: {QUESTION} ASSISTANT:"],
                "raw_generation_responses": [GOOD, BAD],
                "new_generations": [GOOD, BAD],
                "prompt": QUESTION,
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "rating_chosen": 5,
                "rating_rejected": 2,
                "chosen_model": "model-x",
                "rejected_model": "model-y",
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=3.0),
        "dataset card on the Hub",
    ),
    Published(
        "argilla/distilabel-intel-orca-dpo-pairs",
        "comparisons",
        (rated_pair(QUESTION, "unchanged", 9.0, 4.0), rated_pair(SECOND, "tie", 9.0, 9.0)),
        Expected((SYSTEM, QUESTION), (GOOD, "tie"), BAD),
        "card of the set in a public collection (schema and first row from the datasets server)",
    ),
    Published(
        "argilla/distilabel-math-preference-dpo",
        "comparisons",
        (
            {
                "metadata": '{"length": 20}',
                "instruction": QUESTION,
                "chosen_response": GOOD,
                "chosen_rating": 5.0,
                "rejected_response": BAD,
                "rejected_rating": 1.0,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=4.0),
        "code that reads it (instruction, chosen_response) and an example from a trial",
    ),
    Published(
        "argilla/dpo-mix-7k",
        "comparisons",
        (
            {
                "dataset": "argilla/distilabel-capybara-dpo-7k-binarized",
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "chosen_rating": 5.0,
                "rejected_rating": 2.0,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=3.0),
        "first version of the card of argilla/kto-mix-15k on the Hub, which lists these columns",
    ),
    Published(
        "argilla/kto-mix-15k",
        "comparisons",
        (kto(True, GOOD), kto(False, BAD)),
        _BETTER,
        "dataset card on the Hub; axolotl's KTO strategies read the conversation from `completion`",
    ),
    Published(
        "argilla/OpenHermesPreferences",
        "comparisons",
        (
            {
                "source": "airoboros2.2",
                "category": "orca",
                "prompt": QUESTION,
                "candidates_completions": [BAD, GOOD],
                "candidate_policies": ["model-x", "model-y"],
                "ranks": [1, 0],
                "rank_str": "1 > 0",
                "chosen_policy": "model-y",
                "chosen": talk(QUESTION, GOOD),
                "rejected_policy": "model-x",
                "rejected": talk(QUESTION, BAD),
            },
        ),
        Expected(_ASKED, (GOOD,), BAD),
        "code that reads it (a typed adapter lists all columns)",
    ),
    Published(
        "argilla/ultrafeedback-binarized-preferences",
        "comparisons",
        (
            {
                "source": "evol_instruct",
                "instruction": QUESTION,
                "chosen_response": GOOD,
                "rejected_response": BAD,
                "chosen_avg_rating": 4.5,
                "rejected_avg_rating": 2.0,
                "chosen_model": "model-x",
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=2.5),
        "memory; axolotl's `argilla` strategy reads instruction, chosen_response and rejected_response",
    ),
    Published(
        "argilla/ultrafeedback-binarized-preferences-cleaned",
        "comparisons",
        (
            {
                "source": "evol_instruct",
                "prompt": QUESTION,
                "chosen": talk(QUESTION, GOOD),
                "chosen-rating": 4.5,
                "chosen-model": "model-x",
                "rejected": talk(QUESTION, BAD),
                "rejected-rating": 2.0,
                "rejected-model": "model-y",
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=2.5),
        "card of a derived set on the Hub with the same columns",
    ),
    Published(
        "axolotl: chat_template.default (messages, chosen, rejected)",
        "comparisons",
        (
            {
                "messages": [system(SYSTEM), user(QUESTION)],
                "chosen": assistant(GOOD),
                "rejected": assistant(BAD),
            },
        ),
        Expected((SYSTEM, QUESTION), (GOOD,), BAD),
        "code: axolotl, prompt_strategies/dpo/chat_template.py",
    ),
    Published(
        "axolotl: chat_template.default with text answers",
        "comparisons",
        ({"messages": [user(QUESTION)], "chosen": GOOD, "rejected": BAD},),
        _BETTER,
        "code: axolotl, prompt_strategies/dpo/chat_template.py",
    ),
    Published(
        "axolotl: chatml.prompt_pairs (system, prompt, chosen, rejected)",
        "comparisons",
        ({"system": SYSTEM, "prompt": QUESTION, "chosen": GOOD, "rejected": BAD},),
        Expected((SYSTEM, QUESTION), (GOOD,), BAD),
        "code: axolotl, prompt_strategies/dpo/chatml.py",
    ),
    Published(
        "berkeley-nest/Nectar",
        "comparisons",
        (
            {
                "prompt": f"\n\nHuman: {QUESTION}\n\nAssistant: ",
                "answers": [
                    {"answer": BAD, "model": "model-x", "rank": 2.0},
                    {"answer": GOOD, "model": "model-y", "rank": 1.0},
                    {"answer": "Ask later.", "model": "model-z", "rank": 3.0},
                ],
                "turns": 1,
                "num_responses": 3,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            },
        ),
        Expected(_ASKED, (GOOD,), "Ask later.", k=3),
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "CarperAI/openai_summarize_comparisons",
        "comparisons",
        ({"prompt": f"POST: {QUESTION}", "chosen": f"TL;DR: {GOOD}", "rejected": f"TL;DR: {BAD}"},),
        _BETTER,
        "memory",
    ),
    Published(
        "Dahoas/rm-static",
        "comparisons",
        (
            {
                "prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:",
                "response": f" {GOOD}",
                "chosen": f" {GOOD}",
                "rejected": f" {BAD}",
            },
        ),
        _BETTER,
        "memory",
    ),
    Published(
        "HuggingFaceH4/stack-exchange-preferences",
        "comparisons",
        (
            {
                "qid": 1,
                "question": QUESTION,
                "answers": [
                    {
                        "answer_id": 2,
                        "author": "someone",
                        "author_id": 3,
                        "author_profile": "https://example.org/3",
                        "pm_score": 5,
                        "selected": True,
                        "text": GOOD,
                    },
                    {
                        "answer_id": 4,
                        "author": "another",
                        "author_id": 5,
                        "author_profile": "https://example.org/5",
                        "pm_score": 0,
                        "selected": False,
                        "text": BAD,
                    },
                ],
                "date": "2020/01/01",
                "metadata": ["https://example.org/questions/1"],
            },
        ),
        _BETTER,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "HuggingFaceH4/ultrafeedback_binarized",
        "comparisons",
        (
            {
                "prompt": QUESTION,
                "prompt_id": "77f8",
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "messages": talk(QUESTION, GOOD),
                "score_chosen": 8.5,
                "score_rejected": 6.0,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=2.5),
        "card of the set in a public collection (schema from the datasets server)",
    ),
    Published(
        "HuggingFaceTB/smoltalk2 (Preference)",
        "comparisons",
        (
            {
                "prompt": QUESTION,
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "chat_template_kwargs": {
                    "custom_instructions": "",
                    "enable_thinking": False,
                    "python_tools": [],
                    "xml_tools": [],
                },
                "source": "tulu_3_8b_pref_mix",
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, template_kwargs="enable_thinking"),
        "memory",
    ),
    Published(
        "HumanLLMs/Human-Like-DPO-Dataset",
        "comparisons",
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},),
        _BETTER,
        "memory",
    ),
    Published(
        "infly/INF-ORM-Preference-Magnitude-80K",
        "comparisons",
        (
            {
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "source": "offsetbias",
                "magnitude": 3.0,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=3.0),
        "code that reads it (chosen, rejected, source and magnitude, with the values 1, 3 and 10)",
    ),
    Published(
        "Intel/orca_dpo_pairs",
        "comparisons",
        ({"system": SYSTEM, "question": QUESTION, "chosen": GOOD, "rejected": BAD},),
        Expected((SYSTEM, QUESTION), (GOOD,), BAD),
        "LLaMA-Factory's dataset_info.json",
    ),
    Published(
        "jondurbin/truthy-dpo-v0.1",
        "comparisons",
        (
            {
                "id": "1f",
                "source": "truthy_dpo",
                "system": SYSTEM,
                "prompt": QUESTION,
                "chosen": GOOD,
                "rejected": BAD,
            },
        ),
        Expected((SYSTEM, QUESTION), (GOOD,), BAD),
        "code that reads it (system, prompt, chosen, rejected); `id` and `source` from memory",
    ),
    Published(
        "LLaMA-Factory: alpaca preference form",
        "comparisons",
        ({"instruction": QUESTION, "input": "It is noon.", "chosen": GOOD, "rejected": BAD},),
        Expected((QUESTION, "It is noon."), (GOOD,), BAD),
        "LLaMA-Factory's data/README.md",
    ),
    Published(
        "LLaMA-Factory: dpo_en_demo.json",
        "comparisons",
        (
            {
                "conversations": [turn("system", SYSTEM), turn("human", QUESTION)],
                "chosen": turn("gpt", GOOD),
                "rejected": turn("gpt", BAD),
            },
        ),
        Expected((SYSTEM, QUESTION), (GOOD,), BAD),
        "file: shared data formats/lf_dpo_en_demo.json",
    ),
    Published(
        "LLaMA-Factory: KTO form (kto_tag)",
        "comparisons",
        (kto_form(GOOD, True), kto_form(BAD, False)),
        _BETTER,
        "LLaMA-Factory's data/README.md",
    ),
    Published(
        "LLaMA-Factory: kto_en_demo.json",
        "comparisons",
        (
            {"messages": talk(QUESTION, BAD), "label": False},
            {"messages": talk(QUESTION, GOOD), "label": True},
        ),
        _BETTER,
        "file: shared data formats/lf_kto_en_demo.json",
    ),
    Published(
        "LLaMA-Factory: oaast_rm_zh.json",
        "comparisons",
        ({"instruction": QUESTION, "input": "", "output": [GOOD, "Green.", BAD]},),
        Expected(_ASKED, (GOOD,), BAD, k=3),
        "file: shared data formats/lf_oaast_rm_zh.json",
    ),
    Published(
        "LLaMA-Factory: v1_dpo_demo.jsonl",
        "comparisons",
        (
            {
                "chosen_messages": [part("user", QUESTION), part("assistant", GOOD)],
                "rejected_messages": [part("user", QUESTION), part("assistant", BAD)],
            },
        ),
        _BETTER,
        "example from a trial of the published shape",
    ),
    Published(
        "llamafactory/RLHF-V",
        "comparisons",
        (
            {
                "conversations": [turn("human", f"<image>{QUESTION}")],
                "chosen": turn("gpt", GOOD),
                "rejected": turn("gpt", BAD),
                "images": ["1.jpg"],
            },
        ),
        Expected(refused="images"),
        "LLaMA-Factory's dataset_info.json",
    ),
    Published(
        "llm-blender/Unified-Feedback",
        "comparisons",
        (
            {
                "id": "row-1",
                "conv_A": talk(QUESTION, BAD),
                "conv_B": talk(QUESTION, GOOD),
                "conv_A_rating": 0.0,
                "conv_B_rating": 1.0,
                "num_turns": 2,
                "source": "openai/summarize_from_feedback",
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=1.0),
        "code that reads it (conv_A, conv_B and their ratings); `id`, `num_turns` and `source` from memory",
    ),
    Published(
        "lmarena-ai/arena-expert-5k",
        "comparisons",
        (expert(QUESTION, "model_a"), expert(SECOND, "both_bad"), expert("What is ice?", "model_b")),
        Expected(_ASKED, (GOOD, "tie", BAD), BAD),
        "dataset card on the Hub (of a copy of the set)",
    ),
    Published(
        "lmarena-ai/arena-human-preference-100k",
        "comparisons",
        (
            battle(
                "model_a",
                conv_metadata={"sum_user_tokens": 7, "sum_assistant_a_tokens": 6, "sum_assistant_b_tokens": 3},
                is_code=False,
                is_refusal=False,
                dedup_tag={"high_freq": False, "sampled": True},
                category_tag={"if_v0.1": {"if": False, "score": 1}},
                judge_hash="b3f1",
            ),
        ),
        _BETTER,
        "memory",
    ),
    Published(
        "lmarena-ai/arena-human-preference-140k",
        "comparisons",
        (arena_140k(QUESTION, "model_a"), arena_140k(SECOND, "both_bad"), arena_140k("What is ice?", "tie")),
        Expected(_ASKED, (GOOD, "tie", "tie"), BAD),
        "schema document of the set in a public repository",
    ),
    Published(
        "lmarena-ai/PPE-Human-Preference-V1",
        "comparisons",
        (
            {
                "question_id": "81",
                "model_a": "model-x",
                "model_b": "model-y",
                "winner": "model_b",
                "prompt": QUESTION,
                "response_1": BAD,
                "response_2": GOOD,
                "language": "English",
                "conv_metadata": {"turns": 1},
                "is_code": False,
                "is_refusal": False,
                "hard_prompt": False,
                "easy_prompt": True,
                "if_prompt": False,
                "math_prompt": False,
                "length_a": 3,
                "length_b": 6,
            },
        ),
        _BETTER,
        "code that reads it (two loaders): model_a wrote response_1, winner names model_a, model_b or a tie",
    ),
    Published(
        "lmarena-ai/PPE-MMLU-Pro-Best-of-K",
        "comparisons",
        (best_of_k(),),
        _BETTER,
        "code that reads it (responses, scores, sampled_conflict_pairs); other columns from memory",
    ),
    Published(
        "lmsys/chatbot_arena_conversations",
        "comparisons",
        (
            battle(
                "tie (bothbad)",
                judge="arena_user_973",
                openai_moderation={"categories": {"hate": False}, "category_scores": {"hate": 0.0}, "flagged": False},
                toxic_chat_tag={"roberta-large": {"flagged": False, "probability": 0.01}},
            ),
        ),
        Expected(_ASKED, ("tie",), flag="both_bad"),
        "card of the set in a public collection (schema from the Hub)",
    ),
    Published(
        "lmsys/lmsys-arena-human-preference-55k",
        "comparisons",
        (
            {
                "id": 30192,
                "model_a": "model-x",
                "model_b": "model-y",
                "prompt": json.dumps([QUESTION]),
                "response_a": json.dumps([BAD]),
                "response_b": json.dumps([GOOD]),
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            },
        ),
        _BETTER,
        "README of a public repository that describes the columns",
    ),
    Published(
        "lmsys/mt_bench_human_judgments",
        "comparisons",
        (judged(1, "model_a"),),
        Expected(_ASKED, (GOOD,), BAD, absent="Seven."),
        "code that reads it (lists all eight columns)",
    ),
    Published(
        "lmsys/mt_bench_human_judgments (turn 2)",
        "comparisons",
        (judged(2, "tie (inconsistent)"),),
        Expected((QUESTION,), ("tie",), present=SECOND),
        "code that reads it (lists all eight columns); the spelling of the tie from a trial",
    ),
    Published(
        "lvwerra/stack-exchange-paired",
        "comparisons",
        (
            {
                "qid": 1,
                "question": QUESTION,
                "date": "2020/01/01",
                "metadata": ["https://example.org/questions/1"],
                "response_j": GOOD,
                "response_k": BAD,
            },
        ),
        _BETTER,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "m-a-p/COIG-P",
        "comparisons",
        (
            {
                "conversations": [turn("human", QUESTION)],
                "chosen": turn("gpt", GOOD),
                "rejected": turn("gpt", BAD),
                "domain": "chat",
            },
        ),
        _BETTER,
        "LLaMA-Factory's dataset_info.json; `domain` from memory",
    ),
    Published(
        "mlabonne/orpo-dpo-mix-40k",
        "comparisons",
        (
            {
                "source": "Airoboros",
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "prompt": QUESTION,
                "question": QUESTION,
            },
        ),
        _BETTER,
        "code that reads it (a docstring lists all columns)",
    ),
    Published(
        "ms-swift: DPO form (messages, rejected_response)",
        "comparisons",
        (
            {
                "messages": [system(SYSTEM), user(QUESTION), assistant("Blue."), user(SECOND), assistant("Seven.")],
                "rejected_response": BAD,
            },
        ),
        Expected((SYSTEM, QUESTION, "Blue.", SECOND), ("Seven.",), BAD),
        "ms-swift's documentation, Custom-dataset.md",
    ),
    Published(
        "ms-swift: KTO form (messages, label)",
        "comparisons",
        (
            {"messages": [system(SYSTEM), *talk(QUESTION, BAD)], "label": False},
            {"messages": [system(SYSTEM), *talk(QUESTION, GOOD)], "label": True},
        ),
        Expected((SYSTEM, QUESTION), (GOOD,), BAD),
        "ms-swift's documentation, Custom-dataset.md",
    ),
    Published(
        "NCSOFT/offsetbias",
        "comparisons",
        (
            {
                "instruction": QUESTION,
                "output_1": GOOD,
                "output_2": BAD,
                "label": 1,
                "id": "off-1",
            },
        ),
        _BETTER,
        "code that reads it: label 1 prefers output_1; `id` from memory",
    ),
    Published(
        "nvidia/HelpSteer",
        "comparisons",
        (helpsteer(BAD, 1), helpsteer(GOOD, 4)),
        _BETTER,
        "dataset card on the Hub (of HelpSteer2, whose ratings have the same columns)",
    ),
    Published(
        "nvidia/HelpSteer2",
        "comparisons",
        (helpsteer(GOOD, 4), helpsteer(BAD, 0)),
        _BETTER,
        "dataset card on the Hub",
    ),
    Published(
        "nvidia/HelpSteer2 (preference)",
        "comparisons",
        (
            strength(QUESTION, -2, GOOD, BAD),
            strength(SECOND, 1, BAD, "Seven."),
        ),
        Expected(_ASKED, (GOOD, "Seven."), BAD),
        "dataset card on the Hub: a positive strength says that response 2 is better",
    ),
    Published(
        "nvidia/HelpSteer3 (preference)",
        "comparisons",
        (
            helpsteer3(QUESTION, -3, GOOD, BAD),
            helpsteer3(SECOND, 2, BAD, "Seven."),
            helpsteer3("What is ice?", 0, GOOD, BAD),
        ),
        Expected(_ASKED, (GOOD, "Seven.", "tie"), BAD, category_column="domain", category="general"),
        "dataset card on the Hub and code that reads it: below zero response 1 is better",
    ),
    Published(
        "nvidia/When2Call (train_pref)",
        "comparisons",
        (
            {
                "messages": [user(QUESTION)],
                "chosen_response": assistant(GOOD),
                "rejected_response": assistant(BAD),
                "tools": [json.dumps(TOOL["function"])],
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, tools="get_weather"),
        "code that reads it (four programs: messages, chosen_response, rejected_response, tools as JSON texts)",
    ),
    Published(
        "openai/summarize_from_feedback (comparisons)",
        "comparisons",
        (
            {
                "info": {
                    "id": "t3_1",
                    "post": QUESTION,
                    "title": "Sky",
                    "subreddit": "askscience",
                    "site": None,
                    "article": None,
                },
                "summaries": [
                    {"text": f" {BAD}", "policy": "sup1", "note": None},
                    {"text": f" {GOOD}", "policy": "ref", "note": None},
                ],
                "choice": 1,
                "worker": "w1",
                "batch": "batch3",
                "split": "train",
                "extra": {"confidence": None},
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, votes=1),
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "openai/webgpt_comparisons",
        "comparisons",
        (
            {
                "question": {"dataset": "eli5", "id": "5x", "full_text": QUESTION},
                "quotes_0": {"title": ["Sky"], "extract": ["The sky is blue."]},
                "answer_0": BAD,
                "tokens_0": {"prefix": [1, 2], "completion": [3, 4]},
                "score_0": -0.5,
                "quotes_1": {"title": ["Sky"], "extract": ["The sky is blue."]},
                "answer_1": GOOD,
                "tokens_1": {"prefix": [1, 2], "completion": [5, 6]},
                "score_1": 0.5,
            },
        ),
        _BETTER,
        "code that reads it: open-instruct, scripts/data/preferences/webgpt.py; `tokens_0` and `tokens_1` from memory",
    ),
    Published(
        "OpenAI: preference fine-tuning (DPO) form",
        "comparisons",
        (
            {
                "input": {"messages": [user(QUESTION)], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [assistant(GOOD)],
                "non_preferred_output": [assistant(BAD)],
            },
        ),
        _BETTER,
        "code that reads it and guides that show a row; `tools` and `parallel_tool_calls` from memory",
    ),
    Published(
        "OpenAssistant/oasst1",
        "comparisons",
        (
            oasst("m1", None, "prompter", QUESTION, None),
            oasst("m2", "m1", "assistant", BAD, 1),
            oasst("m3", "m1", "assistant", GOOD, 0),
        ),
        _BETTER,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "OpenAssistant/oasst2 (tree files)",
        "comparisons",
        (
            {
                "message_tree_id": "m1",
                "tree_state": "ready_for_export",
                "prompt": node("prompter", QUESTION, None, node("assistant", GOOD, 0), node("assistant", BAD, 1)),
            },
        ),
        _BETTER,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "openbmb/RLAIF-V-Dataset",
        "comparisons",
        (
            {
                "ds_name": "RLAIF-V",
                "image": {"bytes": None, "path": "1.jpg"},
                "question": QUESTION,
                "chosen": GOOD,
                "rejected": BAD,
                "origin_dataset": "TextVQA",
                "origin_split": "train",
                "idx": 0,
                "image_path": "RLAIF-V/1.jpg",
            },
        ),
        Expected(refused="image"),
        "example from a trial of the published shape and LLaMA-Factory's dataset_info.json; other columns from memory",
    ),
    Published(
        "openbmb/UltraFeedback",
        "comparisons",
        (
            {
                "source": "evol_instruct",
                "instruction": QUESTION,
                "models": ["model-x", "model-y", "model-z"],
                "completions": [annotated(BAD, 2), annotated(GOOD, 5), annotated("Ask later.", 1)],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            },
        ),
        Expected(_ASKED, (GOOD,), "Ask later.", k=3),
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "openbmb/UltraInteract_pair",
        "comparisons",
        (
            {
                "task": "Math_CoT",
                "dataset": "gsm8k",
                "trajectory": [turn("user", QUESTION), turn("assistant", "Step 1: look up."), turn("user", "Go on.")],
                "chosen": f"Step 2: {GOOD}",
                "rejected": f"Step 2: {BAD}",
                "id": "1",
                "parent_id": "0",
            },
        ),
        Expected((QUESTION, "Step 1: look up.", "Go on."), (GOOD,), BAD),
        "code that reads it: open-instruct, scripts/data/preferences/ultrainteract.py",
    ),
    Published(
        "PandaLM: testset-v1.json",
        "comparisons",
        (
            {
                "idx": 0,
                "motivation_app": "Gmail",
                "cmp_key": "model-x_model-y",
                "instruction": QUESTION,
                "input": "",
                "response1": BAD,
                "response2": GOOD,
                "annotator1": 2,
                "annotator2": 2,
                "annotator3": 0,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, votes=3),
        "file: shared data pandalm_testset.json",
    ),
    Published(
        "PKU-Alignment/BeaverTails",
        "comparisons",
        (beaver(BAD, False), beaver(GOOD, True)),
        _BETTER,
        "example from a trial of the published shape",
    ),
    Published(
        "PKU-Alignment/PKU-SafeRLHF",
        "comparisons",
        (safe_rlhf(1, BAD, GOOD),),
        _BETTER,
        "code that reads it (several programs list the columns)",
    ),
    Published(
        "PKU-Alignment/PKU-SafeRLHF-10K",
        "comparisons",
        (
            {
                "prompt": QUESTION,
                "response_0": GOOD,
                "response_1": BAD,
                "is_response_0_safe": False,
                "is_response_1_safe": True,
                "better_response_id": 0,
                "safer_response_id": 1,
            },
        ),
        _BETTER,
        "inventory of the set in a public repository",
    ),
    Published(
        "PKU-Alignment/PKU-SafeRLHF-single-dimension",
        "comparisons",
        (
            {
                "prompt": QUESTION,
                "response_0": GOOD,
                "response_1": BAD,
                "prompt_source": "Alpaca3-8B",
                "response_0_source": "Alpaca-7B",
                "response_1_source": "Alpaca3-70B",
                "better_response_id": 0,
                "response_0_sha256": "6f1e",
                "response_1_sha256": "a04b",
            },
        ),
        _BETTER,
        "schema document of the set in a public repository",
    ),
    Published(
        "princeton-nlp/llama3-ultrafeedback-armorm",
        "comparisons",
        (
            {
                "prompt_id": "77f8",
                "prompt": QUESTION,
                "all_generated_responses": [BAD, GOOD],
                "all_rm_scores": [0.08, 0.17],
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
            },
        ),
        _BETTER,
        "code that reads it (a docstring and a program that rebuilds its rows)",
    ),
    Published(
        "prometheus-eval/Preference-Collection",
        "comparisons",
        (preference_collection(),),
        Expected(_ASKED, (GOOD,), BAD, absent="###Task Description"),
        "code that reads it (a check of the expected fields lists all columns)",
    ),
    Published(
        "RLHFlow/preference_700K",
        "comparisons",
        (
            {
                "rejected": talk(QUESTION, BAD),
                "rejected_score": 2.0,
                "chosen_score": 5.0,
                "chosen": talk(QUESTION, GOOD),
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=3.0),
        "memory; an example from a trial of the published shape names the score columns",
    ),
    Published(
        "ScalerLab/JudgeBench",
        "comparisons",
        (
            {
                "pair_id": "81ec",
                "original_id": "10646",
                "source": "mmlu-pro-physics",
                "question": QUESTION,
                "response_model": "model-x",
                "response_A": BAD,
                "response_B": GOOD,
                "label": "B>A",
            },
        ),
        _BETTER,
        "README of ScalerLab/JudgeBench",
    ),
    Published(
        "Skywork/Skywork-Reward-Preference-80K-v0.2",
        "comparisons",
        ({"chosen": talk(QUESTION, GOOD), "rejected": talk(QUESTION, BAD), "source": "helpsteer2"},),
        _BETTER,
        "memory",
    ),
    Published(
        "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset",
        "comparisons",
        (
            {
                "prompt_id": "77f8",
                "prompt": QUESTION,
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "all_generated_responses": [GOOD, BAD],
                "all_rm_scores": [1.5, -1.5],
            },
        ),
        _BETTER,
        "memory; its rows have the columns of princeton-nlp/llama3-ultrafeedback-armorm",
    ),
    Published(
        "stanfordnlp/SHP",
        "comparisons",
        (
            {
                "post_id": "qt3nxl",
                "domain": "askculinary_train",
                "upvote_ratio": 0.98,
                "history": QUESTION,
                "c_root_id_A": "hk1",
                "c_root_id_B": "hk2",
                "created_at_utc_A": 1636822112,
                "created_at_utc_B": 1636822110,
                "score_A": 340,
                "score_B": 166,
                "human_ref_A": GOOD,
                "human_ref_B": BAD,
                "labels": 1,
                "seconds_difference": 2.0,
                "score_ratio": 2.05,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, category_column="domain", category="askculinary_train"),
        "card of the set in a public collection (schema from the datasets server); labels 1 prefers A",
    ),
    Published(
        "tatsu-lab/alpaca_farm (alpaca_human_preference)",
        "comparisons",
        (
            {
                "instruction": QUESTION,
                "input": "It is noon.",
                "output_1": BAD,
                "output_2": GOOD,
                "preference": 2,
                "raw_preference": 2,
            },
        ),
        Expected((QUESTION, "It is noon."), (GOOD,), BAD),
        "code that reads it: preference 1 prefers output_1; `raw_preference` from memory",
    ),
    Published(
        "THU-KEG/RM-Bench",
        "comparisons",
        (
            {
                "id": "1",
                "prompt": QUESTION,
                "chosen": [GOOD, f"{GOOD} It is so by day.", f"**{GOOD}**"],
                "rejected": [BAD, f"{BAD} Ask later.", f"**{BAD}**"],
                "domain": "chat",
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, k=6, category_column="domain", category="chat"),
        "README of THU-KEG/RM-Bench",
    ),
    Published(
        "trl-lib/kto-mix-14k",
        "comparisons",
        (
            {"prompt": [user(QUESTION)], "completion": [assistant(GOOD)], "label": True},
            {"prompt": [user(QUESTION)], "completion": [assistant(BAD)], "label": False},
        ),
        _BETTER,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "trl-lib/tldr-preference",
        "comparisons",
        ({"prompt": f"POST: {QUESTION}\n\nTL;DR:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},),
        _BETTER,
        "memory",
    ),
    Published(
        "trl-lib/ultrafeedback_binarized",
        "comparisons",
        (
            {
                "chosen": talk(QUESTION, GOOD),
                "rejected": talk(QUESTION, BAD),
                "score_chosen": 6.0,
                "score_rejected": 4.0,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, margin=2.0),
        "report in a public repository that prints the first row",
    ),
    Published(
        "TRL: explicit conversational prompt with tools",
        "comparisons",
        (
            {
                "prompt": [user(QUESTION)],
                "chosen": [assistant(GOOD)],
                "rejected": [assistant(BAD)],
                "tools": TOOLS,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, tools="get_weather"),
        "TRL's reward trainer, which renders `tools`",
    ),
    Published(
        "Vezora/Code-Preference-Pairs",
        "comparisons",
        ({"input": QUESTION, "accepted": GOOD, "rejected": BAD, "ID": 1},),
        _BETTER,
        "code that reads it (input, accepted, rejected); `ID` from memory",
    ),
    Published(
        "vicgalle/configurable-system-prompt-multitask",
        "comparisons",
        (
            {"system": SYSTEM, "prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "task": "one"},
            {"system": "You never answer.", "prompt": QUESTION, "chosen": BAD, "rejected": GOOD, "task": "two"},
        ),
        Expected((SYSTEM, QUESTION), (GOOD, BAD), BAD, rows=2),
        "example from a trial of the published shape",
    ),
    Published(
        "vwxyzjn/lm-human-preferences",
        "comparisons",
        (
            {
                "query": QUESTION,
                "sample0": BAD,
                "sample1": "Green.",
                "sample2": GOOD,
                "sample3": "Ask later.",
                "best": 2,
            },
        ),
        Expected(_ASKED, (GOOD,), BAD, k=4),
        "memory",
    ),
    Published(
        "xinlai/Math-Step-DPO-10K",
        "comparisons",
        (
            {
                "dataset": "gsm8k",
                "prompt": "What is 2+3+4?",
                "initial_reason_steps": "Let's think step by step. Step 1: 2+3=5.\nStep 2:",
                "chosen": " 5+4=9.",
                "rejected": " 5+4=10.",
                "full_chosen": " 5+4=9. The answer is 9.",
                "full_rejected": " 5+4=10. The answer is 10.",
                "answer": "9",
            },
        ),
        Expected(("What is 2+3+4?",), ("5+4=9.",), "5+4=10.", present="Step 1: 2+3=5.", absent="The answer is"),
        "notes in a public repository that list all columns, and code that reads it",
    ),
)
"""Sets that compare answers, sorted by name."""


# --- demonstrations ---------------------------------------------------------------------------------------------------


def magpie(**further: Any) -> Row:
    return {
        "uuid": "u1",
        "model": "model-x",
        "gen_input_configs": {"temperature": 1.0, "top_p": 1.0},
        **further,
    }


def wild_turn(role: str, text: str) -> Row:
    return {
        "content": text,
        "country": "Norway",
        "hashed_ip": "22fd",
        "header": {"accept-language": "en", "user-agent": "browser"},
        "language": "English",
        "redacted": False,
        "role": role,
        "state": "Oslo",
        "timestamp": None,
        "toxic": False,
        "turn_identifier": 101001,
    }


def moderation() -> Row:
    return {"categories": {"hate": False}, "category_scores": {"hate": 0.0}, "flagged": False}


DEMONSTRATIONS = (
    Published(
        "AI-MO/NuminaMath-CoT",
        "demonstrations",
        (
            {
                "source": "olympiads",
                "problem": QUESTION,
                "solution": GOOD,
                "messages": talk(QUESTION, GOOD),
            },
        ),
        _ANSWERED,
        "memory",
    ),
    Published(
        "ajibawa-2023/Code-290k-ShareGPT",
        "demonstrations",
        ({"id": "1", "conversations": turns(QUESTION, GOOD)},),
        _ANSWERED,
        "memory",
    ),
    Published(
        "allenai/tulu-3-sft-mixture",
        "demonstrations",
        ({"id": "row-1", "messages": talk(QUESTION, GOOD), "source": "ai2-adapt-dev/flan_v2_converted"},),
        _ANSWERED,
        "card of the set in a public collection (schema from the datasets server)",
    ),
    Published(
        "allenai/WildChat-1M",
        "demonstrations",
        (
            {
                "conversation_hash": "c9ec",
                "model": "model-x",
                "timestamp": "2023-04-09T00:02:53",
                "conversation": [wild_turn("user", QUESTION), wild_turn("assistant", GOOD)],
                "turn": 1,
                "language": "English",
                "openai_moderation": [moderation(), moderation()],
                "detoxify_moderation": [{"toxicity": 0.001}, {"toxicity": 0.001}],
                "toxic": False,
                "redacted": False,
                "state": "Oslo",
                "country": "Norway",
                "hashed_ip": "22fd",
                "header": {"accept-language": "en", "user-agent": "browser"},
            },
        ),
        _ANSWERED,
        "card of the set in a public collection (schema and first row from the datasets server)",
    ),
    Published(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        "demonstrations",
        ({"id": "QWJh_0", "conversations": [*turns(QUESTION, GOOD), *turns(SECOND, "Seven.")]},),
        _TWO_TURNS,
        "file: shared data formats/fastchat_dummy_conversation.json has this form",
    ),
    Published(
        "BAAI/Infinity-Instruct",
        "demonstrations",
        (
            {
                "id": 1,
                "conversations": turns(QUESTION, GOOD),
                "label": {"ability_en": ["general knowledge"], "cate_ability_en": ["knowledge"]},
                "langdetect": "en",
                "source": "flan",
            },
        ),
        _ANSWERED,
        "memory; LLaMA-Factory's dataset_info.json reads `conversations`",
    ),
    Published(
        "bespokelabs/Bespoke-Stratos-17k",
        "demonstrations",
        ({"system": SYSTEM, "conversations": turns(QUESTION, GOOD, "user", "assistant")},),
        _ANSWERED_WITH_SYSTEM,
        "memory",
    ),
    Published(
        "bigscience/xP3",
        "demonstrations",
        ({"inputs": QUESTION, "targets": GOOD},),
        _ANSWERED,
        "example from a trial of the published shape",
    ),
    Published(
        "CohereForAI/aya_dataset",
        "demonstrations",
        (
            {
                "inputs": QUESTION,
                "targets": GOOD,
                "language": "English",
                "language_code": "eng",
                "annotation_type": "original-annotations",
                "user_id": "u1",
            },
        ),
        _ANSWERED,
        "example from a trial of the published shape; other columns from memory",
    ),
    Published(
        "databricks/databricks-dolly-15k",
        "demonstrations",
        ({"instruction": QUESTION, "context": "It is noon.", "response": GOOD, "category": "closed_qa"},),
        Expected((QUESTION, "It is noon."), completion=GOOD, rows=1, category_column="category", category="closed_qa"),
        "file: shared data dolly_3k.jsonl",
    ),
    Published(
        "GAIR/lima",
        "demonstrations",
        ({"conversations": [QUESTION, GOOD, SECOND, "Seven."], "source": "stackexchange"},),
        _TWO_TURNS,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "garage-bAInd/Open-Platypus",
        "demonstrations",
        ({"input": "", "output": GOOD, "instruction": QUESTION, "data_source": "scibench"},),
        _ANSWERED,
        "memory",
    ),
    Published(
        "glaiveai/glaive-function-calling-v2",
        "demonstrations",
        (
            {
                "system": f"SYSTEM: You may call these functions - {json.dumps(TOOL['function'])}",
                "chat": (
                    f"USER: {QUESTION}\n\n\nASSISTANT: <functioncall> "
                    '{"name": "get_weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>\n\n\n'
                    'FUNCTION RESPONSE: {"sky": "clear"}\n\n\n'
                    f"ASSISTANT: {GOOD} <|endoftext|>\n\n\n"
                ),
            },
        ),
        Expected(("You may call these functions", QUESTION), completion=GOOD, rows=2, absent="<|endoftext|>"),
        "example from a trial of the published shape; the form of the calls from memory",
    ),
    Published(
        "HuggingFaceH4/no_robots",
        "demonstrations",
        (
            {
                "prompt": QUESTION,
                "prompt_id": "3c3e",
                "messages": [system(SYSTEM), *talk(QUESTION, GOOD)],
                "category": "Closed QA",
            },
        ),
        Expected((SYSTEM, QUESTION), completion=GOOD, rows=1, category_column="category", category="Closed QA"),
        "memory",
    ),
    Published(
        "HuggingFaceH4/ultrachat_200k",
        "demonstrations",
        (
            {
                "prompt": QUESTION,
                "prompt_id": "f0e3",
                "messages": [*talk(QUESTION, GOOD), *talk(SECOND, "Seven.")],
            },
        ),
        _TWO_TURNS,
        "memory; LLaMA-Factory's dataset_info.json reads `messages`",
    ),
    Published(
        "HuggingFaceTB/smoltalk",
        "demonstrations",
        ({"messages": talk(QUESTION, GOOD), "source": "smol-magpie-ultra"},),
        _ANSWERED,
        "memory",
    ),
    Published(
        "HuggingFaceTB/smoltalk2 (SFT)",
        "demonstrations",
        (
            {
                "messages": talk(QUESTION, GOOD),
                "chat_template_kwargs": {
                    "custom_instructions": "",
                    "enable_thinking": False,
                    "python_tools": [],
                    "xml_tools": [],
                },
                "source": "smoltalk_smollm3_systemchats",
            },
        ),
        Expected(_ASKED, completion=GOOD, rows=1, template_kwargs="enable_thinking"),
        "memory",
    ),
    Published(
        "LDJnr/Capybara",
        "demonstrations",
        (
            {
                "source": "General-Instruct",
                "conversation": [{"input": QUESTION, "output": GOOD}, {"input": SECOND, "output": "Seven."}],
            },
        ),
        _TWO_TURNS,
        "card of argilla/distilabel-capybara-dpo-7k-binarized on the Hub, which keeps both columns",
    ),
    Published(
        "liuhaotian/LLaVA-Instruct-150K",
        "demonstrations",
        ({"id": "000000033471", "image": "000000033471.jpg", "conversations": turns(f"{QUESTION}\n<image>", GOOD)},),
        Expected(refused="image"),
        "example from a trial of the published shape",
    ),
    Published(
        "LLaMA-Factory: alpaca form with system and history",
        "demonstrations",
        (
            {
                "instruction": SECOND,
                "input": "",
                "output": "Seven.",
                "system": SYSTEM,
                "history": [[QUESTION, GOOD]],
            },
        ),
        Expected((SYSTEM, QUESTION, GOOD, SECOND), completion="Seven."),
        "LLaMA-Factory's data/README.md",
    ),
    Published(
        "LLaMA-Factory: glaive_toolcall_en_demo.json",
        "demonstrations",
        (
            {
                "conversations": [
                    turn("human", QUESTION),
                    turn("function_call", json.dumps(CALL)),
                    turn("observation", '{"sky": "clear"}'),
                    turn("gpt", GOOD),
                ],
                "tools": json.dumps([TOOL["function"]]),
            },
        ),
        Expected(_ASKED, completion=GOOD, rows=2, tools="get_weather"),
        "file: shared data formats/lf_glaive_toolcall_en_demo.json",
    ),
    Published(
        "LLaMA-Factory: mllm_demo.json",
        "demonstrations",
        ({"messages": talk(f"<image>{QUESTION}", GOOD), "images": ["mllm_demo_data/1.jpg"]},),
        Expected(refused="images"),
        "LLaMA-Factory's dataset_info.json",
    ),
    Published(
        "LLaMA-Factory: mllm_video_audio_demo.json",
        "demonstrations",
        (
            {
                "messages": talk(f"<video><audio>{QUESTION}", GOOD),
                "videos": ["mllm_demo_data/4.mp4"],
                "audios": ["mllm_demo_data/4.mp3"],
            },
        ),
        Expected(refused="videos"),
        "LLaMA-Factory's dataset_info.json",
    ),
    Published(
        "LLaMA-Factory: reason_tool_use_demo_50.jsonl",
        "demonstrations",
        (
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "value": SYSTEM}]},
                    {"role": "user", "content": [{"type": "text", "value": QUESTION}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "The weather helps."},
                            {"type": "tool_call", "value": json.dumps(CALL)},
                        ],
                    },
                    {"role": "tool", "content": [{"type": "text", "value": '{"sky": "clear"}'}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "The sky is clear."},
                            {"type": "text", "value": GOOD},
                        ],
                    },
                ],
                "tools": TOOLS,
            },
        ),
        Expected((SYSTEM, QUESTION), completion=GOOD, rows=2, tools="get_weather"),
        "file: LLaMA-Factory's data/reason_tool_use_demo_50.jsonl",
    ),
    Published(
        "LLaMA-Factory: v1_sft_demo.jsonl",
        "demonstrations",
        ({"messages": [part("user", QUESTION), part("assistant", GOOD)]},),
        _ANSWERED,
        "example from a trial of the published shape",
    ),
    Published(
        "lmsys/lmsys-chat-1m",
        "demonstrations",
        (
            {
                "conversation_id": "33f0",
                "model": "model-x",
                "conversation": talk(QUESTION, GOOD),
                "turn": 1,
                "language": "English",
                "openai_moderation": [moderation(), moderation()],
                "redacted": False,
            },
        ),
        _ANSWERED,
        "memory; LLaMA-Factory's dataset_info.json reads `conversation`",
    ),
    Published(
        "Locutusque/function-calling-chatml",
        "demonstrations",
        (
            {
                "conversations": [
                    turn("system", SYSTEM),
                    turn("human", QUESTION),
                    turn("function-call", json.dumps(CALL)),
                    turn("function-response", '{"sky": "clear"}'),
                    turn("gpt", GOOD),
                ],
            },
        ),
        Expected((SYSTEM, QUESTION), completion=GOOD, rows=2),
        "example from a trial of the published shape",
    ),
    Published(
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "demonstrations",
        ({"query": QUESTION, "answer": GOOD, "resource": "evol-instruct", "lang": "python"},),
        _ANSWERED,
        "memory",
    ),
    Published(
        "Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered",
        "demonstrations",
        (
            magpie(
                instruction=QUESTION,
                response=GOOD,
                conversations=turns(QUESTION, GOOD),
                task_category="Information seeking",
                other_task_category=[],
                task_category_generator="model-y",
                difficulty="easy",
                intent="The user wants a fact.",
                knowledge="Everyday knowledge.",
                difficulty_generator="model-y",
                input_quality="good",
                quality_explanation="The question is clear.",
                quality_generator="model-y",
                llama_guard_2="safe",
                reward_model="model-z",
                instruct_reward=-1.5,
                min_neighbor_distance=0.2,
                repeat_count=1,
                min_similar_uuid="u2",
                instruction_length=27,
                response_length=20,
                language="EN",
            ),
        ),
        _ANSWERED,
        "memory",
    ),
    Published(
        "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered",
        "demonstrations",
        (
            magpie(
                conversations=[*turns(QUESTION, GOOD), *turns(SECOND, "Seven.")],
                instruction=QUESTION,
                response=GOOD,
                instruction_2=SECOND,
                response_2="Seven.",
            ),
        ),
        _TWO_TURNS,
        "example from a trial of the published shape; `gen_input_configs` from memory",
    ),
    Published(
        "Magpie-Align/Magpie-Pro-300K-Filtered",
        "demonstrations",
        ({"conversations": turns(QUESTION, GOOD), "uuid": "9e21"},),
        _ANSWERED,
        "card of the set in a public collection (schema and first row from the datasets server)",
    ),
    Published(
        "meta-math/MetaMathQA",
        "demonstrations",
        ({"type": "GSM_Rephrased", "query": QUESTION, "original_question": "Of which color is it?", "response": GOOD},),
        _ANSWERED,
        "code that reads it (query, original_question, response); `type` from memory",
    ),
    Published(
        "microsoft/orca-math-word-problems-200k",
        "demonstrations",
        ({"question": QUESTION, "answer": GOOD},),
        _ANSWERED,
        "memory",
    ),
    Published(
        "ms-swift: query, response, history form",
        "demonstrations",
        ({"system": SYSTEM, "query": SECOND, "response": "Seven.", "history": [[QUESTION, GOOD]]},),
        Expected((SYSTEM, QUESTION, GOOD, SECOND), completion="Seven."),
        "ms-swift's documentation, Custom-dataset.md",
    ),
    Published(
        "ms-swift: ShareGPT form (conversation of human and assistant)",
        "demonstrations",
        (
            {
                "system": SYSTEM,
                "conversation": [
                    {"human": QUESTION, "assistant": GOOD},
                    {"human": SECOND, "assistant": "Seven."},
                ],
            },
        ),
        Expected((SYSTEM, QUESTION), completion="Seven.", rows=2),
        "ms-swift's documentation, Custom-dataset.md",
    ),
    Published(
        "nomic-ai/gpt4all-j-prompt-generations",
        "demonstrations",
        ({"prompt": QUESTION, "response": GOOD, "source": "laion/unified_chip2"},),
        _ANSWERED,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "NousResearch/hermes-function-calling-v1",
        "demonstrations",
        (
            {
                "id": "85f3",
                "conversations": [
                    turn("system", f"You call functions. <tools> {TOOLS} </tools>"),
                    turn("human", QUESTION),
                    turn("gpt", f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"),
                    turn("tool", '<tool_response>\n{"sky": "clear"}\n</tool_response>'),
                    turn("gpt", GOOD),
                ],
                "tools": TOOLS,
                "category": "Weather",
                "subcategory": "Forecast",
                "task": "Look up the weather",
            },
        ),
        Expected(
            ("You call functions.", QUESTION),
            completion=GOOD,
            rows=2,
            tools="get_weather",
            category_column="category",
            category="Weather",
        ),
        "dataset card on the Hub (ShareGPT form); the other columns from memory",
    ),
    Published(
        "nvidia/Daring-Anteater",
        "demonstrations",
        (
            {
                "system": SYSTEM,
                "mask": "User",
                "dataset": "sharegpt",
                "conversations": [
                    {"from": "User", "value": QUESTION, "label": None},
                    {"from": "Assistant", "value": GOOD, "label": "quality:4,toxicity:0"},
                ],
            },
        ),
        _ANSWERED_WITH_SYSTEM,
        "example from a trial of the published shape; `dataset` and the turns' labels from memory",
    ),
    Published(
        "nvidia/Llama-Nemotron-Post-Training-Dataset",
        "demonstrations",
        (
            {
                "input": [user(QUESTION)],
                "output": GOOD,
                "category": "chat",
                "license": "cc-by-4.0",
                "reasoning": "off",
                "generator": "model-x",
                "used_in_training": "Ultra",
                "version": "v1.1",
                "system_prompt": "detailed thinking off",
            },
        ),
        Expected(("detailed thinking off", QUESTION), completion=GOOD, rows=1),
        "example from a trial (input, output, category, system_prompt); other columns from memory",
    ),
    Published(
        "nvidia/Nemotron-Post-Training-Dataset-v1",
        "demonstrations",
        (
            {
                "uuid": "u1",
                "license": "cc-by-4.0",
                "generator": "model-x",
                "version": "v1",
                "category": "chat",
                "reasoning": "off",
                "messages": [
                    {"role": "user", "content": QUESTION, "tool_calls": []},
                    {"role": "assistant", "content": GOOD, "tool_calls": []},
                ],
                "metadata": "{}",
            },
        ),
        Expected(_ASKED, completion=GOOD, rows=1, category_column="category", category="chat"),
        "dataset card on the Hub",
    ),
    Published(
        "nvidia/OpenMathInstruct-2",
        "demonstrations",
        (
            {
                "problem": QUESTION,
                "generated_solution": GOOD,
                "expected_answer": "blue",
                "problem_source": "augmented_gsm8k",
            },
        ),
        _ANSWERED,
        "memory",
    ),
    Published(
        "Open-Orca/OpenOrca",
        "demonstrations",
        ({"id": "niv.242684", "system_prompt": SYSTEM, "question": QUESTION, "response": GOOD},),
        _ANSWERED_WITH_SYSTEM,
        "LLaMA-Factory's dataset_info.json; `id` from memory",
    ),
    Published(
        "Open-Orca/SlimOrca",
        "demonstrations",
        (
            {
                "conversations": [
                    {"from": "system", "value": SYSTEM, "weight": None},
                    {"from": "human", "value": QUESTION, "weight": 0.0},
                    {"from": "gpt", "value": GOOD, "weight": 1.0},
                ],
            },
        ),
        _ANSWERED_WITH_SYSTEM,
        "memory; LLaMA-Factory's dataset_info.json reads `conversations`",
    ),
    Published(
        "open-r1/OpenR1-Math-220k",
        "demonstrations",
        (
            {
                "problem": QUESTION,
                "solution": "It is blue.",
                "answer": "blue",
                "problem_type": "Other",
                "question_type": "math-word-problem",
                "source": "olympiads",
                "uuid": "u1",
                "is_reasoning_complete": [True, True],
                "generations": [f"<think>\nBlue.\n</think>\n\n{GOOD}", f"<think>\nSky.\n</think>\n\n{GOOD}"],
                "correctness_math_verify": [True, True],
                "correctness_llama": None,
                "finish_reasons": None,
                "correctness_count": 2,
                "messages": talk(QUESTION, f"<think>\nBlue.\n</think>\n\n{GOOD}"),
            },
        ),
        _ANSWERED,
        "code that reads it (a program that removes all fourteen columns by name)",
    ),
    Published(
        "open-thoughts/OpenThoughts-114k",
        "demonstrations",
        (
            {
                "system": SYSTEM,
                "conversations": turns(
                    QUESTION,
                    f"<|begin_of_thought|>\n\nBlue.\n\n<|end_of_thought|>\n\n{GOOD}",
                    "user",
                    "assistant",
                ),
            },
        ),
        _ANSWERED_WITH_SYSTEM,
        "memory",
    ),
    Published(
        "open-thoughts/OpenThoughts3-1.2M",
        "demonstrations",
        (
            {
                "difficulty": 7,
                "source": "ai2-adapt-dev/openmath-2-math",
                "domain": "math",
                "conversations": turns(QUESTION, f"<think>\nBlue.\n</think>\n\n{GOOD}"),
            },
        ),
        Expected(_ASKED, completion=GOOD, rows=1, category_column="domain", category="math"),
        "memory",
    ),
    Published(
        "openai/gsm8k",
        "demonstrations",
        ({"question": QUESTION, "answer": f"{GOOD}\n#### blue"},),
        _ANSWERED,
        "example from a trial of the published shape",
    ),
    Published(
        "OpenAI: chat fine-tuning form with tools",
        "demonstrations",
        (
            {
                "messages": [
                    user(QUESTION),
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "call_1",
                                "type": "function",
                                "function": {"name": "get_weather", "arguments": json.dumps(CALL["arguments"])},
                            }
                        ],
                    },
                ],
                "parallel_tool_calls": False,
                "tools": [TOOL],
            },
        ),
        Expected(_ASKED, completion="get_weather", rows=1, tools="get_weather"),
        "memory",
    ),
    Published(
        "PKU-Alignment/BeaverTails (as demonstrations)",
        "demonstrations",
        (beaver(GOOD, True), beaver("UNSAFE.", False)),
        Expected(_ASKED, completion=GOOD, rows=1, absent="UNSAFE."),
        "example from a trial of the published shape",
    ),
    Published(
        "prometheus-eval/Feedback-Collection",
        "demonstrations",
        (
            {
                "orig_response": "The sky is up.",
                "orig_reference_answer": "Blue.",
                "output": GOOD,
                "input": "",
                "orig_instruction": "Of which color is it?",
                "orig_feedback": "The answer is short.",
                "orig_score1_description": "Wrong.",
                "orig_score2_description": "Poor.",
                "orig_score3_description": "Fair.",
                "orig_score4_description": "Good.",
                "orig_score5_description": "Right.",
                "orig_score": "4",
                "orig_criteria": "Is the answer right?",
                "instruction": QUESTION,
            },
        ),
        _ANSWERED,
        "card of a derived set, which lists these columns; instruction and output are a judge's prompt and verdict",
    ),
    Published(
        "sahil2801/CodeAlpaca-20k",
        "demonstrations",
        ({"output": GOOD, "instruction": QUESTION, "input": "It is noon."},),
        Expected((QUESTION, "It is noon."), completion=GOOD, rows=1),
        "memory; LLaMA-Factory's dataset_info.json reads it as the alpaca form",
    ),
    Published(
        "Salesforce/APIGen-MT-5k",
        "demonstrations",
        (
            {
                "conversations": [
                    turn("human", QUESTION),
                    turn("function_call", json.dumps(CALL)),
                    turn("observation", '{"sky": "clear"}'),
                    turn("gpt", GOOD),
                ],
                "tools": json.dumps([TOOL["function"]]),
                "system": SYSTEM,
            },
        ),
        Expected((SYSTEM, QUESTION), completion=GOOD, rows=2, tools="get_weather"),
        "memory",
    ),
    Published(
        "Salesforce/xlam-function-calling-60k",
        "demonstrations",
        (
            {
                "id": 0,
                "query": QUESTION,
                "answers": json.dumps([CALL]),
                "tools": json.dumps(
                    [
                        {
                            "name": "get_weather",
                            "description": "Looks up the weather of a city.",
                            "parameters": {"city": {"description": "Its name.", "type": "str", "default": "Oslo"}},
                        }
                    ]
                ),
            },
        ),
        Expected(_ASKED, completion="get_weather", rows=1, tools="get_weather"),
        "code that reads it (query, answers and tools as JSON text)",
    ),
    Published(
        "stingning/ultrachat",
        "demonstrations",
        ({"id": "0", "data": [QUESTION, GOOD, SECOND, "Seven."]},),
        _TWO_TURNS,
        "example from a trial of the published shape",
    ),
    Published(
        "tatsu-lab/alpaca",
        "demonstrations",
        (
            {
                "instruction": QUESTION,
                "input": "",
                "output": GOOD,
                "text": f"### Instruction:\n{QUESTION}\n\n### Response:\n{GOOD}",
            },
        ),
        _ANSWERED,
        "memory",
    ),
    Published(
        "Team-ACE/ToolACE",
        "demonstrations",
        (
            {
                "system": f"You may call: {TOOLS}",
                "conversations": [
                    turn("user", QUESTION),
                    turn("assistant", '[get_weather(city="Oslo")]'),
                    turn("tool", '{"sky": "clear"}'),
                    turn("assistant", GOOD),
                ],
            },
        ),
        Expected(("You may call:", QUESTION), completion=GOOD, rows=2),
        "memory",
    ),
    Published(
        "teknium/OpenHermes-2.5",
        "demonstrations",
        (
            {
                "custom_instruction": None,
                "topic": None,
                "model_name": None,
                "model": None,
                "skip_prompt_formatting": False,
                "category": "orca",
                "conversations": turns(QUESTION, GOOD),
                "views": None,
                "language": None,
                "id": None,
                "title": None,
                "idx": None,
                "hash": None,
                "avatarUrl": None,
                "system_prompt": SYSTEM,
                "source": "airoboros2.2",
            },
        ),
        Expected((SYSTEM, QUESTION), completion=GOOD, rows=1, category_column="category", category="orca"),
        "code that reads it (a program that removes all sixteen columns by name)",
    ),
    Published(
        "theblackcat102/evol-codealpaca-v1",
        "demonstrations",
        ({"output": GOOD, "instruction": QUESTION},),
        _ANSWERED,
        "memory",
    ),
    Published(
        "TIGER-Lab/MathInstruct",
        "demonstrations",
        ({"source": "data/CoT/aqua_rat.json", "output": GOOD, "instruction": QUESTION},),
        _ANSWERED,
        "LLaMA-Factory's dataset_info.json; `source` from memory",
    ),
    Published(
        "timdettmers/openassistant-guanaco",
        "demonstrations",
        ({"text": f"### Human: {QUESTION}### Assistant: {GOOD}### Human: {SECOND}### Assistant: Seven."},),
        _TWO_TURNS,
        "memory; the library's tests have read this column since its first version",
    ),
    Published(
        "trl-lib/kto-mix-14k (as demonstrations)",
        "demonstrations",
        (
            {"prompt": [user(QUESTION)], "completion": [assistant(GOOD)], "label": True},
            {"prompt": [user(QUESTION)], "completion": [assistant("DISLIKED.")], "label": False},
        ),
        Expected(_ASKED, completion=GOOD, rows=1, absent="DISLIKED."),
        "example from a trial of the published shape",
    ),
    Published(
        "trl-lib/tldr",
        "demonstrations",
        ({"prompt": f"POST: {QUESTION}\n\nTL;DR:", "completion": f" {GOOD}"},),
        _ANSWERED,
        "memory; the library's tests have read these columns since its first version",
    ),
    Published(
        "WizardLMTeam/WizardLM_evol_instruct_70k",
        "demonstrations",
        ({"instruction": QUESTION, "output": GOOD},),
        _ANSWERED,
        "memory",
    ),
    Published(
        "WizardLMTeam/WizardLM_evol_instruct_V2_196k",
        "demonstrations",
        ({"idx": "QWJh", "conversations": turns(QUESTION, GOOD)},),
        _ANSWERED,
        "memory; LLaMA-Factory's dataset_info.json reads `conversations`",
    ),
)
"""Sets of answered instructions, sorted by name."""

PUBLISHED = (*COMPARISONS, *DEMONSTRATIONS)
