// Videos: every method's film of one prompt, all at the same frame. A film is one picture with all frames, row by row.
const GAIN = 4; // of the differences, as in the figures

for (const element of document.querySelectorAll(".films")) {
  const { fps, settings, methods, prompts } = comparisons[Number(element.dataset.comparison)];
  const part = (name) => element.querySelector(name);
  const [prompt, work, speed, play, frame, difference] = [".prompt-choice", ".work", ".speed", ".play", ".frame", ".difference"].map(part);
  const baseline = settings[0];
  const tiles = [...new Set(settings.map((name) => methods[name]))].map(tile);
  let began = null; // {time, frame} of the last start; null: it stands still
  let count = 1;

  fill(prompt, prompts.map(({ id, text }) => `${id}: ${text}`));
  prompt.addEventListener("change", load);
  work.addEventListener("change", () => { choose(); load(); });
  speed.addEventListener("change", () => began && start());
  play.addEventListener("click", () => (began ? stop() : start()));
  frame.addEventListener("input", () => { stop(); show(); });
  difference.addEventListener("change", show);
  element.addEventListener("keydown", press);
  choose();
  load();

  function tile(method) {
    const { content } = document.querySelector("#film");
    const figure = content.firstElementChild.cloneNode(true);
    const [choice, canvas, note] = ["select", "canvas", "figcaption"].map((name) => figure.querySelector(name));
    const own = settings.filter((name) => methods[name] === method);
    fill(choice, own);
    choice.addEventListener("change", load);
    part(".tiles").append(figure);
    return { own, choice, canvas, note, film: new Image(), pen: canvas.getContext("2d", { willReadFrequently: true }) };
  }

  // Of each method the setting whose work is nearest to that share of the uncached video's.
  function choose() {
    const { images: drawn } = prompts[prompt.selectedIndex];
    const wanted = Number(work.value) * drawn[baseline].evaluations;
    const distance = (name) => (drawn[name] ? Math.abs(Math.log(drawn[name].evaluations / wanted)) : Infinity);
    for (const { own, choice } of tiles) choice.value = own.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  }

  function load() {
    const { text, images: drawn } = prompts[prompt.selectedIndex];
    part(".prompt").textContent = text;
    count = drawn[baseline].frames;
    frame.max = count - 1;
    return Promise.all(tiles.map(({ choice, canvas, note, film }) => {
      const entry = drawn[choice.value];
      canvas.hidden = !entry;
      note.textContent = entry ? entry.note : "no video";
      canvas.setAttribute("aria-label", `${choice.value}: ${text}`);
      if (entry) film.src = images[entry.image];
      else film.removeAttribute("src");
      return entry && film.decode().catch(() => {}); // the next choice came first
    })).then(show);
  }

  function show() {
    const at = Number(frame.value);
    const reference = pixels(tiles[0], at);
    part(".frame-number").textContent = `frame ${at + 1} of ${count}`;
    for (const each of tiles.slice(1)) {
      const own = pixels(each, at);
      if (difference.checked && own && reference) each.pen.putImageData(apart(own, reference), 0, 0);
    }
  }

  // Draws the frame, and returns its pixels.
  function pixels({ film, canvas, pen }, at) {
    if (!film.complete || !film.naturalWidth) return null;
    const columns = Math.ceil(Math.sqrt(count));
    const [width, height] = [film.naturalWidth / columns, film.naturalHeight / Math.ceil(count / columns)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    pen.drawImage(film, (at % columns) * width, Math.floor(at / columns) * height, width, height, 0, 0, width, height);
    return pen.getImageData(0, 0, width, height);
  }

  // Mean over the channels of how far each pixel is from the reference's, GAIN times, as gray.
  function apart(own, reference) {
    for (let k = 0; k < own.data.length; k += 4) {
      const off = [0, 1, 2].map((channel) => Math.abs(own.data[k + channel] - reference.data[k + channel]));
      own.data.fill((GAIN * (off[0] + off[1] + off[2])) / 3, k, k + 3);
    }
    return own;
  }

  function start() {
    began = { time: performance.now(), frame: Number(frame.value) };
    play.textContent = "Pause";
    requestAnimationFrame(run);
  }

  function stop() {
    began = null;
    play.textContent = "Play";
  }

  function run(now) {
    if (!began) return;
    const passed = Math.max(0, (now - began.time) / 1000) * fps * Number(speed.value);
    const at = Math.floor(began.frame + passed) % count;
    if (at !== Number(frame.value)) {
      frame.value = at;
      show();
    }
    requestAnimationFrame(run);
  }

  // Space plays and pauses, arrows go from frame to frame; what has the focus keeps the keys that it takes itself.
  function press(event) {
    const takes = { SELECT: [" ", "ArrowLeft", "ArrowRight"], BUTTON: [" "], INPUT: event.target === frame ? [] : [" "] };
    if (event.ctrlKey || event.metaKey || event.altKey || takes[event.target.tagName]?.includes(event.key)) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      stop();
      frame.value = (Number(frame.value) + step + count) % count;
      show();
    } else if (event.key === " ") {
      play.click();
    } else return;
    event.preventDefault();
  }
}
