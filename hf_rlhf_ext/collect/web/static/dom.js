// Small helpers for elements. Text goes in as text; only `setHtml` takes HTML, which the server has cleaned.

/** The element with this id; a missing one is a mistake in the page. */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) {
    throw new Error(`no element #${id}`);
  }
  return element;
}

/**
 * Makes an element. `attributes` are set as attributes, except `text`; null and false leave one out.
 * Children are elements or strings.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) {
      continue;
    }
    if (name === "text") {
      element.textContent = value;
    } else {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children);
  return element;
}

/** Text that only screen readers say. */
export function hidden(text) {
  return make("span", { class: "for-readers", text });
}

/** Puts HTML of the server into an element; wide tables scroll inside instead of widening the page. */
export function setHtml(element, html) {
  element.innerHTML = html;
  for (const table of element.querySelectorAll("table")) {
    const scroller = make("div", { class: "scroller" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
}

/** Whatever is wider than its place can be reached by keyboard, and nothing else becomes a tab stop. */
export function markScrollers(root) {
  for (const element of root.querySelectorAll(".prose pre, .prose .scroller")) {
    if (element.scrollWidth > element.clientWidth) {
      element.tabIndex = 0;
      element.setAttribute("role", "group");
      const name = element.tagName === "PRE" ? "Code" : "Table";
      element.setAttribute("aria-label", `${name}, scrolls sideways`);
    } else {
      element.removeAttribute("tabindex");
      element.removeAttribute("role");
      element.removeAttribute("aria-label");
    }
  }
}

/** Wires every button with data-close to close the dialog that it is in. */
export function wireDialogs() {
  for (const button of document.querySelectorAll("dialog [data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) {
        dialog.close(); // a click on the backdrop
      }
    });
  }
}

/** "9 s", "1 min 20 s"; a dash where nothing was measured. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) {
    return "–";
  }
  if (seconds < 9.95) {
    return `${Math.round(seconds * 10) / 10} s`;
  }
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
