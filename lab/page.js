"use strict";
const panel = document.getElementById("panel");
const names = JSON.parse(document.getElementById("names").textContent);

// ---------------------------------------------------------------- a step of a thought

const traces = new WeakMap(); // thought -> its data, read when first asked for

function dataOf(thought) {
  if (!traces.has(thought))
    traces.set(thought, JSON.parse(thought.querySelector("script").textContent));
  return traces.get(thought);
}

function split(piece) { // its sure tokens, until now one text, become elements too
  if (piece.dataset.split || piece.dataset.start === "None") return;
  piece.dataset.split = "yes";
  const lengths = dataOf(piece.closest(".thought")).n;
  let step = Number(piece.dataset.start);
  for (const node of [...piece.childNodes]) {
    if (node instanceof Element) step++;
    else {
      const points = [...node.data], made = [];
      for (let at = 0; at < points.length; at += lengths[step++])
        made.push(element("i", points.slice(at, at + lengths[step]).join("")));
      node.replaceWith(...made);
    }
  }
}

function stepOf(token) {
  let step = Number(token.parentNode.dataset.start);
  for (let at = token; (at = at.previousElementSibling); ) step++;
  return step;
}

function tokenOf(thought, step) {
  let found = null;
  for (const piece of thought.querySelectorAll(".piece"))
    if (piece.dataset.start !== "None" && Number(piece.dataset.start) <= step) found = piece;
  if (!found) return null;
  split(found);
  return found.children[step - Number(found.dataset.start)];
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function show(token) {
  const thought = token.closest(".thought"), data = dataOf(thought), step = stepOf(token);
  const own = names[thought.dataset.model];
  const seen = (id) => (own[id] ?? "#" + id).replace(/ /g, "␣").replace(/\n/g, "⏎");
  const parts = data.c[step], flat = Array.isArray(parts) ? parts : [parts, 1e4];
  const chosen = data.t[step] ?? flat[0], H = data.H[step] || "under 0.00001";
  panel.replaceChildren(element("p", `step ${step + 1}, entropy ${H} nats`));
  if (step in data.d) panel.append(element("p", "greedy decoding: " + seen(data.d[step])));
  for (let i = 0; i < flat.length; i += 2) {
    const row = element("div", "", flat[i] === chosen ? "chosen" : "");
    const bar = document.createElement("meter");
    bar.value = flat[i + 1] / 1e4;
    bar.setAttribute("aria-hidden", "true");
    row.append(element("bdi", seen(flat[i])), bar);
    row.append(element("span", (flat[i + 1] / 100).toFixed(2) + " %"));
    panel.append(row);
  }
  if (!flat.some((x, i) => i % 2 === 0 && x === chosen))
    panel.append(element("p", "drawn: " + seen(chosen) + ", which is none of these"));
  panel.hidden = false;
}

function go(token) { // the one token of its thought that the tab key reaches
  for (const old of token.closest(".thought").querySelectorAll("i[tabindex]"))
    old.removeAttribute("tabindex");
  token.tabIndex = 0;
  token.focus();
  token.scrollIntoView({ block: "nearest" });
}

const isToken = (node) => node instanceof Element && node.matches(".piece > i");

for (const kind of ["mouseover", "focusin", "click"])
  document.addEventListener(kind, (event) => {
    let token = event.target;
    if (!(token instanceof Element)) return;
    const piece = token.closest(".piece");
    if (piece) split(piece);
    if (piece && kind === "focusin" && token === piece) {
      piece.removeAttribute("tabindex");
      go(piece.firstElementChild);
    }
    if (token === piece && kind !== "focusin")
      token = document.elementFromPoint(event.clientX, event.clientY);
    if (isToken(token)) show(token);
    else if (kind === "click" && !event.target.closest(".curve")) panel.hidden = true;
  });

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") panel.hidden = true;
  const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
  if (!move || !isToken(event.target)) return;
  const next = tokenOf(event.target.closest(".thought"), stepOf(event.target) + move);
  if (next) go(next);
  event.preventDefault();
});

document.addEventListener("click", (event) => { // in the curve of the entropy: to the step
  const curve = event.target instanceof Element && event.target.closest(".curve");
  if (!curve) return;
  const { left, width } = curve.firstElementChild.getBoundingClientRect(), wide = 640; // as lab/charts.py has it
  const share = (((event.clientX - left) / width) * wide - 62) / (wide - 74);
  const last = curve.dataset.steps - 1;
  const step = Math.min(last, Math.max(0, Math.floor(share * (last + 1))));
  const token = tokenOf(curve.closest("article").querySelector(".thought"), step);
  if (token) go(token);
});

function reach(root) { // by the tab key
  for (const thought of root.querySelectorAll(".thought")) {
    const first = thought.querySelector('.piece:not([data-start="None"])');
    if (first) first.tabIndex = 0;
  }
}

// ---------------------------------------------------------------- records

const filter = document.getElementById("filter");

const built = new WeakMap(); // problem -> the promise of its records

function build(problem) { // of a large page: its records are packed until they are wanted
  if (!built.has(problem)) built.set(problem, unpack(problem));
  return built.get(problem);
}

async function unpack(problem) {
  const kept = problem.querySelector(":scope > .packed");
  if (!kept) return;
  const bytes = Uint8Array.from(atob(kept.textContent), (byte) => byte.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  problem.insertAdjacentHTML("beforeend", await new Response(stream).text());
  kept.remove();
  reach(problem);
  apply();
}

function apply() {
  const wanted = new FormData(filter), words = wanted.get("problem").toLowerCase();
  const asked = ["label", "outcome", "end"].filter((name) => wanted.get(name));
  let count = 0, total = 0;
  for (const problem of document.querySelectorAll(".problem")) {
    let any = false;
    const named = !words || problem.firstElementChild.textContent.toLowerCase().includes(words)
      || problem.querySelector(".text").textContent.toLowerCase().includes(words);
    for (const mark of problem.querySelectorAll(".mark")) {
      const fits = named && asked.every((name) => wanted.get(name) === mark.dataset[name]);
      const record = document.getElementById(mark.hash.slice(1));
      if (record) record.hidden = !fits;
      any ||= fits;
      count += fits;
      total++;
    }
    problem.hidden = !any;
  }
  document.getElementById("count").textContent = `${count} of ${total} records`;
}

async function reveal() { // the record that the address names
  const name = CSS.escape(location.hash.slice(1));
  const mark = document.querySelector(`.mark[href="#${name}"]`);
  if (mark) {
    const problem = mark.closest(".problem");
    await build(problem);
    problem.open = true;
  }
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  if (target.hidden || target.closest(".problem[hidden]")) {
    filter.reset();
    apply();
  }
  target.scrollIntoView();
}

if (filter) {
  filter.hidden = false;
  filter.addEventListener("input", apply);
  filter.addEventListener("submit", (event) => event.preventDefault());
}
document.addEventListener("toggle", (event) => {
  if (event.target.matches(".problem")) build(event.target);
}, true);
addEventListener("hashchange", reveal);
reach(document);
reveal();
