// Which key means what. Keys that a focused field or button needs for itself stay with it.

const TEXT_FIELDS = "textarea, input[type='text']";
const NEEDS_ARROWS = "input[type='radio'], pre, .scroller";
const ACTS_ON_ENTER = "button, a, summary";

/**
 * The digit of a key press, or null. On keyboards whose digits need Shift (French), the plain key counts too. The keys
 * of a numeric pad count only if they write digits: else they are arrows.
 */
export function digitOf(event) {
  if (/^[0-9]$/.test(event.key)) {
    return Number(event.key);
  }
  const match = /^Digit([0-9])$/.exec(event.code);
  return match !== null && !event.shiftKey ? Number(match[1]) : null;
}

/** The letter of a key press in lower case, or the key itself. Keyboards without Latin letters count by position. */
export function letterOf(event) {
  const key = event.key ?? ""; // a browser that fills in a field sends none
  const match = /^Key([A-Z])$/.exec(event.code);
  if (match !== null && key > "\u007f" && !event.shiftKey) {
    return match[1].toLowerCase();
  }
  return event.shiftKey ? key : key.toLowerCase(); // Caps Lock may be on
}

/**
 * Calls `page` with what a key press asks for.
 * @param page object with isOpenDialog(), digit(n), save(), leaveField(), move(step), isLetter(key), letter(key)
 */
export function listenToKeys(page) {
  document.addEventListener("keydown", (event) => {
    // 229: a key of an input method, which Safari does not mark as composing when it ends the composition.
    const isComposing = event.isComposing || event.keyCode === 229;
    if (isComposing || event.defaultPrevented || page.isOpenDialog()) {
      return;
    }
    if (handle(event, page)) {
      event.preventDefault();
    }
  });
}

function handle(event, page) {
  const target = event.target instanceof Element ? event.target : document.body;
  const isText = target.matches(TEXT_FIELDS);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    return act(event, () => page.save());
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.getModifierState("AltGraph")) {
    return false;
  }
  if (event.key === "Escape" && (isText || target.matches("select"))) {
    return act(event, () => page.leaveField());
  }
  if (isText || target.matches("select")) {
    return false;
  }
  if (event.key === "Enter") {
    return target.matches(ACTS_ON_ENTER) ? false : act(event, () => page.save());
  }
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    const step = event.key === "ArrowLeft" ? -1 : 1;
    return target.matches(NEEDS_ARROWS) ? false : act(event, () => page.move(step));
  }
  return handleCharacter(event, page);
}

function handleCharacter(event, page) {
  const digit = event.key === "?" ? null : digitOf(event);
  if (digit !== null) {
    return act(event, () => page.digit(digit));
  }
  if (event.key === "Backspace" || event.key === "Delete") {
    return act(event, () => page.digit(0));
  }
  const letter = letterOf(event);
  if (!page.isLetter(letter)) {
    return false;
  }
  return act(event, () => page.letter(letter));
}

/** A key that is held down acts once: its repeats are taken and do nothing. */
function act(event, action) {
  if (!event.repeat) {
    action();
  }
  return true;
}
