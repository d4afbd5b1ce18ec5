// The pages work without this: it keeps a ballot from being sent twice, and an open results page up to date.
"use strict";

for (const form of document.querySelectorAll("form[data-once]")) {
  const button = form.querySelector("button[type=submit]");
  form.addEventListener("submit", () => { button.disabled = true; });
  // The page may come back from the history as it was left.
  addEventListener("pageshow", () => { button.disabled = false; });
}

const EVERY_MS = 2000;
const AFTER_FAILURE_MS = 10000;
const SOON_ENOUGH_MS = 8000;

function show(section, tally) {
  const set = (root, selector, text) => { root.querySelector(selector).textContent = text; };
  const plural = (count) => (count === 1 ? "" : "s");
  const number = (count) => count.toLocaleString("en-GB");
  for (const choice of tally.choices) {
    const bar = section.querySelector(`[data-choice="${choice.id}"]`);
    if (!bar) continue; // Added in the admin since this page was loaded.
    bar.style.setProperty("--share", choice.percent.toFixed(2));
    bar.classList.toggle("bar--leads", choice.leads);
    set(bar, "[data-percent]", choice.percent.toFixed(0));
    set(bar, "[data-votes]", number(choice.votes));
    set(bar, "[data-plural]", plural(choice.votes));
  }
  set(section, "[data-total]", number(tally.total));
  set(section, "[data-total-plural]", plural(tally.total));
  const empty = section.querySelector("[data-empty]");
  if (empty) empty.hidden = tally.total > 0;
}

async function refresh(section) {
  let wait = EVERY_MS;
  if (!document.hidden) {
    const mark = section.querySelector("[data-live-mark]");
    try {
      const response = await fetch(section.dataset.live, { signal: AbortSignal.timeout(SOON_ENOUGH_MS) });
      if (!response.ok) throw new Error(`the server answered ${response.status}`);
      show(section, await response.json());
      mark.hidden = false;
    } catch (error) {
      console.warn("The results could not be refreshed:", error);
      mark.hidden = true;
      wait = AFTER_FAILURE_MS;
    }
  }
  setTimeout(refresh, wait, section);
}

for (const section of document.querySelectorAll("[data-live]")) {
  setTimeout(refresh, EVERY_MS, section);
}
