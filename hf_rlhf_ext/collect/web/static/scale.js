// The scale 1 to 7: which of two answers is better, or how good one answer is.

import { hidden, make } from "./dom.js";

const PAIR = [
  "A is much better",
  "A is better",
  "A is slightly better",
  "Both are equally good",
  "B is slightly better",
  "B is better",
  "B is much better",
];
const PAIR_SHORT = [
  "A much better",
  "A better",
  "A slightly better",
  "Tie",
  "B slightly better",
  "B better",
  "B much better",
];
const RATING = ["Very bad", "Bad", "Rather bad", "Middling", "Rather good", "Good", "Excellent"];

export class Scale {
  /**
   * @param kind "compare" or "rate"
   * @param onPick called when the person clicked or tapped a value: not for arrow keys, which only move the choice
   */
  constructor(kind, onPick) {
    const long = kind === "compare" ? PAIR : RATING;
    const short = kind === "compare" ? PAIR_SHORT : RATING;
    const legend = kind === "compare" ? "Which answer is better?" : "How good is this answer?";
    const steps = make("div", { class: "steps" });
    this.inputs = long.map((label, index) => this.addStep(steps, index + 1, label, short[index], onPick));
    const ends = make(
      "div",
      { class: "ends", "aria-hidden": "true" },
      make("span", { text: kind === "compare" ? "← A better" : "← worse" }),
      make("span", { text: kind === "compare" ? "tie" : "" }),
      make("span", { text: kind === "compare" ? "B better →" : "better →" }),
    );
    this.element = make("fieldset", { class: "scale" }, make("legend", {}, hidden(legend)), steps, ends);
  }

  addStep(steps, value, label, short, onPick) {
    const input = make("input", { type: "radio", name: "scale", value, class: "for-readers" });
    const step = make(
      "label",
      { class: "step", title: label },
      input,
      make("span", { class: "digit", text: value, "aria-hidden": "true" }),
      hidden(`${value}: ${label}`),
      make("span", { class: "short", text: short, "aria-hidden": "true" }),
    );
    step.addEventListener("click", (event) => {
      if (event.target !== input) {
        onPick(value); // the browser clicks the input itself after this one
      }
    });
    steps.append(step);
    return input;
  }

  get value() {
    const chosen = this.inputs.find((input) => input.checked);
    return chosen ? Number(chosen.value) : null;
  }

  set value(value) {
    for (const input of this.inputs) {
      input.checked = Number(input.value) === value;
    }
  }
}
