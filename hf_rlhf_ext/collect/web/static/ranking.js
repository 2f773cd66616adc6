// Ranks for three and more answers: by digits on the answer in focus, by the buttons on each answer, or by dragging
// its letter to a place. Several answers may share a place: a tie.

import { hidden, make } from "./dom.js";

const DRAG_FROM_PX = 6; // a shorter move is a click

/** Places may have gaps while a person sorts; what is sent has none: 1 + the number of better answers. */
export function competitionRanks(places) {
  return places.map((place) => 1 + places.filter((other) => other < place).length);
}

export class Ranking {
  /**
   * @param letters names of the answers, such as ["A", "B", "C"]
   * @param texts first words of each answer, to recognize it by
   * @param onChange called after a change by the person, with the number of the answer
   */
  constructor(letters, texts, onChange) {
    this.letters = letters;
    this.onChange = onChange;
    this.places = letters.map(() => null);
    this.lifted = null; // the answer that the next click on a place puts there
    this.tiers = this.makeTiers();
    this.chips = letters.map((letter, index) => this.makeChip(letter, texts[index], index));
    this.radios = letters.map((letter, index) => this.makeRadios(letter, index));
    const tiers = make("div", { class: "tiers" }, ...this.tiers);
    tiers.style.setProperty("--places", letters.length);
    const hint = "Drag a letter to its place, or click the letter and then the place. One place can hold several.";
    this.element = make(
      "section",
      { class: "board", "aria-labelledby": "board-name" },
      make("h3", { id: "board-name", text: "Ranking" }),
      make("p", { class: "hint", text: hint }),
      tiers,
    );
    this.draw();
  }

  makeTiers() {
    const last = this.letters.length;
    const tiers = [this.makeTier(null, "No place yet")];
    for (let place = 1; place <= last; place += 1) {
      const words = { 1: "1 · best", [last]: `${last} · worst` };
      tiers.push(this.makeTier(place, words[place] ?? String(place)));
    }
    return tiers;
  }

  makeTier(place, name) {
    const tier = make(
      "div",
      { class: "tier", "data-place": place ?? "" },
      make("span", { class: "tier-name", text: name }),
      make("div", { class: "chips" }),
    );
    tier.addEventListener("click", (event) => {
      if (this.lifted !== null && event.target.closest(".chip") === null) {
        const index = this.lifted;
        this.lift(null);
        this.put(index, place);
      }
    });
    return tier;
  }

  makeChip(letter, text, index) {
    const chip = make(
      "button",
      { type: "button", class: "chip", "data-answer": index, "aria-pressed": "false" },
      make("span", { class: "letter", text: letter }),
      make("span", { class: "words", dir: "auto", text: text.slice(0, 60) }),
    );
    let from = null;
    let hasMoved = false;
    chip.addEventListener("pointerdown", (event) => {
      if (event.button === 0) {
        from = { x: event.clientX, y: event.clientY };
        hasMoved = false;
        chip.setPointerCapture(event.pointerId);
      }
    });
    chip.addEventListener("pointermove", (event) => {
      if (from === null) {
        return;
      }
      const x = event.clientX - from.x;
      const y = event.clientY - from.y;
      hasMoved = hasMoved || Math.hypot(x, y) > DRAG_FROM_PX;
      if (hasMoved) {
        chip.classList.add("dragged");
        chip.style.translate = `${x}px ${y}px`;
        this.highlight(this.tierAt(event.clientX, event.clientY));
      }
    });
    const end = (event, isDropped) => {
      from = null;
      chip.classList.remove("dragged");
      chip.style.translate = "";
      this.highlight(null);
      const tier = this.tierAt(event.clientX, event.clientY);
      if (isDropped && hasMoved && tier !== null) {
        this.put(index, tier.dataset.place === "" ? null : Number(tier.dataset.place));
      }
    };
    chip.addEventListener("pointerup", (event) => from !== null && end(event, true));
    chip.addEventListener("pointercancel", (event) => from !== null && end(event, false));
    chip.addEventListener("click", () => {
      if (!hasMoved) {
        this.lift(this.lifted === index ? null : index);
      }
      hasMoved = false;
    });
    return chip;
  }

  makeRadios(letter, index) {
    const group = make("fieldset", { class: "places" }, make("legend", {}, hidden(`Place of answer ${letter}`)));
    const inputs = [];
    for (let place = 1; place <= this.letters.length; place += 1) {
      const input = make("input", { type: "radio", name: `place-${index}`, value: place, class: "for-readers" });
      input.addEventListener("change", () => this.put(index, place));
      const words = place === 1 ? "1, best" : String(place);
      group.append(
        make(
          "label",
          { class: "place" },
          input,
          make("span", { class: "digit", text: place, "aria-hidden": "true" }),
          hidden(words),
        ),
      );
      inputs.push(input);
    }
    return { group, inputs };
  }

  tierAt(x, y) {
    for (const tier of this.tiers) {
      const box = tier.getBoundingClientRect();
      if (x >= box.left && x <= box.right && y >= box.top && y <= box.bottom) {
        return tier;
      }
    }
    return null;
  }

  highlight(tier) {
    for (const other of this.tiers) {
      other.classList.toggle("over", other === tier);
    }
  }

  lift(index) {
    this.lifted = index;
    for (const [other, chip] of this.chips.entries()) {
      chip.setAttribute("aria-pressed", String(other === index));
    }
  }

  /** Gives an answer a place (null: none) because the person did so. */
  put(index, place) {
    if (place !== null && (place < 1 || place > this.letters.length)) {
      return;
    }
    this.places[index] = place;
    this.draw();
    this.onChange(index);
  }

  draw() {
    for (const [index, chip] of this.chips.entries()) {
      const place = this.places[index];
      const chips = this.tiers[place ?? 0].querySelector(".chips");
      if (chip.parentElement !== chips) {
        chips.append(chip);
      }
      for (const input of this.radios[index].inputs) {
        input.checked = Number(input.value) === place;
      }
    }
  }

  /** Number of the first answer without a place, or null. */
  get missing() {
    const index = this.places.indexOf(null);
    return index === -1 ? null : index;
  }

  get value() {
    return this.missing === null ? competitionRanks(this.places) : null;
  }

  set value(ranks) {
    this.places = this.letters.map((_, index) => ranks?.[index] ?? null);
    this.draw();
  }
}
