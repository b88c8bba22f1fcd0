// Blind preference: pairs of a method's image and the baseline's, in random order and on random sides. Names are not in
// the ballot; they appear with the result. Votes live in this page: exported as a file, imported from any number of them.
for (const element of document.querySelectorAll(".blind")) {
  const { experiment, model, settings, prompts } = comparisons[Number(element.dataset.comparison)];
  const part = (name) => element.querySelector(name);
  const [against, ...methods] = settings;
  const ballot = part("dialog");
  const every = pairs();
  const imported = new Map(); // voter -> votes
  let own = [];
  let left = []; // pairs that are still to be shown, the next one last

  part(".count").max = every.length;
  part(".count").value = Math.min(20, every.length);
  part(".begin").addEventListener("click", begin);
  part(".export").addEventListener("click", save);
  part(".import").addEventListener("change", (event) => load([...event.target.files]).then(() => (event.target.value = "")));
  part(".undo").addEventListener("click", undo);
  part(".stop").addEventListener("click", () => ballot.close());
  for (const button of element.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => vote(button.dataset.choice));
  }
  for (const image of ballot.querySelectorAll("img")) {
    image.addEventListener("load", () => image.classList.toggle("small-image", image.naturalWidth <= 256));
  }
  ballot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if ("120".includes(event.key)) vote(event.key);
    else if (event.key === "Backspace" || event.key === "u") undo();
    else return;
    event.preventDefault();
  });
  ballot.addEventListener("close", () => {
    for (const image of ballot.querySelectorAll("img")) image.removeAttribute("src");
    tell();
  });

  // Every prompt with every method; of `count` of them each method gets its share.
  function pairs() {
    return prompts.flatMap(({ id, text, images: drawn }) =>
      methods.filter((method) => drawn[method] && drawn[against]).map((method) => ({
        prompt: id, text, setting: method, images: { [method]: drawn[method].image, [against]: drawn[against].image },
      })));
  }

  function begin() {
    const done = new Set(own.map(key));
    const shares = new Map(methods.map((method) => [method, 0]));
    const open = shuffled(every.filter((pair) => !done.has(key(pair))))
      .map((pair) => [shares.set(pair.setting, shares.get(pair.setting) + 1).get(pair.setting), pair])
      .sort(([a], [b]) => a - b)
      .map(([, pair]) => pair);
    left = shuffled(open.slice(0, Math.max(0, Number(part(".count").value) - own.length)));
    if (!left.length) return tell();
    for (const pair of left) pair.left = Math.random() < 0.5 ? against : pair.setting;
    part(".result").replaceChildren();
    part(".state").textContent = "";
    ballot.showModal();
    show();
  }

  function show() {
    const pair = left.at(-1);
    part(".progress").textContent = `${own.length + 1} of ${own.length + left.length}`;
    part(".ballot .prompt").textContent = pair.text;
    part(".first").src = images[pair.images[pair.left]];
    part(".second").src = images[pair.images[other(pair)]];
    part(".undo").disabled = !own.length;
  }

  function vote(choice) {
    if (!ballot.open || !left.length) return;
    const pair = left.pop();
    const preferred = { 1: pair.left, 2: other(pair), 0: null }[choice];
    own.push({ prompt: pair.prompt, setting: pair.setting, against, left: pair.left, preferred });
    if (left.length) show();
    else ballot.close();
  }

  function undo() {
    const last = own.pop();
    if (!last) return;
    left.push({ ...every.find((pair) => key(pair) === key(last)), left: last.left });
    show();
  }

  function save() {
    const file = { format: "h2cache-votes-1", model, experiment, voter: voter(), votes: own };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
    link.download = `votes-${experiment}-${voter()}.json`.replace(/[^\w.-]+/g, "_");
    link.click();
    URL.revokeObjectURL(link.href);
  }

  // A file of this voter's goes on; one of another voter counts beside it.
  async function load(files) {
    const known = new Set(every.map(key));
    for (const file of files) {
      try {
        const read = JSON.parse(await file.text());
        if (read.format !== "h2cache-votes-1") throw new Error("it holds no votes");
        if (read.experiment !== experiment || read.model !== model) throw new Error("its votes are of another experiment");
        const votes = read.votes.filter((each) => known.has(key(each)) && each.against === against);
        if (String(read.voter) === voter()) own = votes;
        else imported.set(String(read.voter), votes);
      } catch (error) {
        return void (part(".state").textContent = `${file.name}: ${error.message}.`);
      }
    }
    tell();
  }

  function tell() {
    const votes = [...own, ...[...imported.values()].flat()];
    const voters = imported.size + (own.length ? 1 : 0);
    part(".state").textContent = `${votes.length} votes of ${voters} ${voters === 1 ? "voter" : "voters"}.`;
    const rows = methods.filter((method) => votes.some((each) => each.setting === method)).map((method) => {
      const of = votes.filter((each) => each.setting === method);
      const wins = of.filter((each) => each.preferred === method).length;
      const losses = of.filter((each) => each.preferred === against).length;
      return [method, wins, losses, of.length - wins - losses, ...rate(wins, wins + losses)];
    });
    const header = ["method", `preferred to ${against}`, "not preferred", "no difference", "win rate", "95 % interval", "p"];
    part(".result").replaceChildren(...(rows.length ? [line("th", header), ...rows.map((row) => line("td", row))] : []));
  }

  function other(pair) { return pair.left === against ? pair.setting : against; }
  function key({ prompt, setting }) { return JSON.stringify([prompt, setting]); }
  function voter() { return part(".voter").value.trim() || "anonymous"; }
}

// Share of wins without ties, Wilson's interval, and the exact two-sided sign test; as in h2cache.eval.report.votes.
function rate(wins, count) {
  if (!count) return ["–", "–", "–"];
  const [z, share] = [1.959964, wins / count];
  const middle = (share + z ** 2 / (2 * count)) / (1 + z ** 2 / count);
  const margin = (z * Math.sqrt((share * (1 - share)) / count + (z / (2 * count)) ** 2)) / (1 + z ** 2 / count);
  let [term, tail] = [-count * Math.LN2, 0]; // the logarithm of the chance of k wins
  for (let k = 0; k <= Math.min(wins, count - wins); k++) {
    tail += Math.exp(term);
    term += Math.log((count - k) / (k + 1));
  }
  const percent = (value) => (100 * value).toFixed(0);
  const interval = `${percent(Math.max(0, middle - margin))} to ${percent(Math.min(1, middle + margin))} %`;
  return [`${percent(share)} %`, interval, Math.min(1, 2 * tail).toFixed(3)];
}

function line(kind, texts) {
  const row = document.createElement("tr");
  row.append(...texts.map((text) => Object.assign(document.createElement(kind), { textContent: text })));
  return row;
}

function shuffled(items) {
  const mixed = [...items];
  for (let k = mixed.length - 1; k > 0; k--) {
    const other = Math.floor(Math.random() * (k + 1));
    [mixed[k], mixed[other]] = [mixed[other], mixed[k]];
  }
  return mixed;
}
