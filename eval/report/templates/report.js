"use strict";

// Tables: a click on a header sorts by its column, a second one the other way round. What has no value stays last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const compare = header.classList.contains("number") ? byNumber : byText;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(a.cells[column], b.cells[column], descending ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}

function byNumber(a, b, sign) {
  const [x, y] = [a, b].map((cell) => cell.dataset.value);
  if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
  const [left, right] = [x, y].map((value) => (value === "inf" ? Infinity : Number(value)));
  return left === right ? 0 : sign * (left < right ? -1 : 1);
}

function byText(a, b, sign) {
  return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
}

// Comparisons: two images above one another, the upper one cut off at the slider. Everything is written as text.
const { images, comparisons } = JSON.parse(document.getElementById("data").textContent);

for (const element of document.querySelectorAll(".compare")) {
  const { settings, prompts } = comparisons[Number(element.dataset.comparison)];
  const part = (name) => element.querySelector(name);
  const [prompt, left, right] = [".prompt-choice", ".left-choice", ".right-choice"].map(part);
  const stage = part(".stage");
  const slider = part(".stage input");

  fill(prompt, prompts.map(({ id, text }) => `${id}: ${text.length > 60 ? `${text.slice(0, 59)}…` : text}`));
  fill(left, settings);
  fill(right, settings);
  right.selectedIndex = settings.length > 1 ? 1 : 0;

  const show = () => {
    const { text, images: drawn } = prompts[prompt.selectedIndex];
    part(".prompt").textContent = text;
    for (const [side, choice] of [["left", left], ["right", right]]) {
      const setting = settings[choice.selectedIndex];
      const entry = drawn[setting];
      const image = part(`img.${side}`);
      image.hidden = !entry;
      if (entry) image.src = images[entry.image];
      image.alt = `${setting}: ${text}`;
      const note = !entry ? "no image" : entry.note;
      part(`.${side}-note`).textContent = note ? `${setting}: ${note}` : setting;
    }
  };
  const slide = () => stage.style.setProperty("--position", `${slider.value}%`);

  for (const image of stage.querySelectorAll("img")) {
    image.addEventListener("load", () => image.classList.toggle("small-image", image.naturalWidth <= 256));
  }
  for (const choice of [prompt, left, right]) choice.addEventListener("change", show);
  slider.addEventListener("input", slide);
  show();
  slide();
}

function fill(select, names) {
  select.append(...names.map((name) => new Option(name)));
}
