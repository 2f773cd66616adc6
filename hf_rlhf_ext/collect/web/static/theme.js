// Light or dark: what the system says, until the person chooses. Loaded in <head> without `defer`, before anything is
// painted, so that a page never flashes in the other colors.
"use strict";
(() => {
  const STORED = "collect-theme";
  const root = document.documentElement;
  const systemIsDark = window.matchMedia("(prefers-color-scheme: dark)");

  function read() {
    try {
      return localStorage.getItem(STORED);
    } catch {
      return null; // storage is turned off: the system decides
    }
  }
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches;
  }
  function describe(button) {
    button.textContent = isDark() ? "Light" : "Dark";
    button.title = isDark() ? "Use light colors" : "Use dark colors";
  }

  const stored = read();
  if (stored === "dark" || stored === "light") {
    root.dataset.theme = stored;
  }
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    if (!button) {
      return;
    }
    describe(button);
    systemIsDark.addEventListener("change", () => describe(button));
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try {
        localStorage.setItem(STORED, root.dataset.theme);
      } catch {
        // Not kept over a reload; the page itself has changed.
      }
      describe(button);
    });
  });
})();
