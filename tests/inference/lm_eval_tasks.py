"""Local tasks of lm_eval, one for each kind of request."""

import json
from pathlib import Path

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "local_next": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "local_written": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: [".", "and"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


def write_tasks(shared_data: Path, directory: Path) -> Path:
    """YAML files of the tasks over one file of rows; some contexts are longer than the model's."""
    directory.mkdir()
    words = (shared_data / "tinystories" / "tiny_stories.txt").read_text()[:60_000].split()
    rows = []
    for number in range(20):
        at, size = 400 * number, (0, 9, 23, 390)[number % 4]
        choices = [" " + " ".join(words[at + size + n : at + size + 3 + n]) for n in (0, 5, 11)]
        text = " ".join(words[at : at + (40, 700)[number % 2]])
        context = " ".join(words[at : at + size]) + " " * (number % 3 == 1)
        rows.append({"context": context, "choices": choices, "text": text})
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        (directory / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {file}\ntest_split: test\n{body}"
        )
    return directory
