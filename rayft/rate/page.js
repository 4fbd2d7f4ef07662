"use strict";

// The page of `rayft rate`. Texts of models are put in as text; their Markdown comes rendered, without HTML of theirs.

const find = (id) => document.getElementById(id);
let shown = null; // what the server wants rated
let ranking = []; // positions picked so far, best first, where there are more than two answers
let since = 0; // when the item was shown, in milliseconds
let busy = false;
let view = localStorage.getItem("view") || "both";

const name = () => crypto.getRandomValues(new Uint32Array(4)).reduce((text, n) => text + n.toString(16).padStart(8, "0"), "");
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function problem(text) {
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

// Ask the server; a call that gets no answer is made again with the same body, which it takes once.
async function ask(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  for (let pause = 500; ; pause = Math.min(2 * pause, 8000)) {
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      problem("The server does not answer; trying again. Nothing that it confirmed is lost.");
      await wait(pause);
      continue;
    }
    const found = await response.json().catch(() => ({ error: `the server answers ${response.status}` }));
    problem(response.ok || response.status === 401 ? "" : found.error);
    return { status: response.status, found };
  }
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, action, className) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function show(found) {
  shown = found;
  ranking = [];
  since = performance.now();
  const rating = Boolean(found.item);
  find("login").hidden = true;
  find("rating").hidden = !rating;
  find("finished").hidden = rating;
  find("who").textContent = found.rater;
  find("progress").hidden = false;
  find("progress").max = Math.max(found.total, 1);
  find("progress").value = found.done;
  find("count").textContent = `${found.done} of ${found.total}`;
  find("comment").value = "";
  document.querySelector("#finished .undo").hidden = !found.undo;
  if (!rating) return;
  find("prompt").replaceChildren(...found.item.turns.map((turn) => {
    const box = element("div", "turn");
    box.append(element("b", "", turn.role), document.createTextNode(turn.content));
    return box;
  }));
  const many = found.item.answers.length > 2;
  find("asked").textContent = many ? "Rank the answers, best first." : "Which answer is better?";
  find("answers").replaceChildren(...found.item.answers.map((answer, at) => {
    const box = element("article", "answer");
    box.dataset.at = at;
    const head = element("h2", "", `Answer ${at + 1}`);
    head.append(element("span", "place"));
    const markdown = element("div", "markdown");
    markdown.innerHTML = answer.html;
    const panes = element("div", `panes ${view}`);
    panes.append(markdown, element("div", "text", answer.raw));
    box.append(head, panes);
    if (many) head.addEventListener("click", () => pick(at));
    return box;
  }));
  const actions = many
    ? [...found.item.answers.map((_, at) => button(`${at + 1}`, () => pick(at))), button("Clear (Backspace)", unpick)]
    : [button("1 is better (1)", () => rate([[0], [1]])), button("Equally good (0)", () => rate([[0, 1]])), button("2 is better (2)", () => rate([[1], [0]]))];
  actions.push(button("Skip (s)", skip));
  if (found.undo) actions.push(button("Undo (u)", undo, "undo"));
  find("buttons").replaceChildren(...actions);
  find("help").textContent = (many ? "Keys: 1 to 9 pick the next best, Backspace takes the last back, 0 all equally good" : "Keys: 1 or left arrow, 2 or right arrow, 0 or t equally good")
    + ", s skip, u undo, c comment, m rendered, raw or both.";
  document.activeElement?.blur();
  window.scrollTo(0, 0);
}

function pick(at) {
  if (ranking.includes(at)) return;
  ranking.push(at);
  mark();
  const count = shown.item.answers.length;
  if (ranking.length === count - 1) ranking.push([...Array(count).keys()].find((n) => !ranking.includes(n)));
  mark();
  if (ranking.length === count) rate(ranking.map((n) => [n]));
}

function unpick() {
  ranking.pop();
  mark();
}

function mark() {
  for (const box of document.querySelectorAll(".answer")) {
    const place = ranking.indexOf(Number(box.dataset.at));
    box.classList.toggle("picked", place >= 0);
    box.querySelector(".place").textContent = place >= 0 ? `place ${place + 1}` : "";
  }
}

async function send(path, body) {
  if (busy || !shown) return;
  busy = true;
  try {
    const { status, found } = await ask(path, { request: name(), ...body });
    if (status === 401) await begin();
    else if (status === 200) show(found);
    else if (status === 409) await begin();
    else { ranking = []; mark(); }
  } finally {
    busy = false;
  }
}

const seconds = () => (performance.now() - since) / 1000;
const rate = (groups) => shown?.item && send("api/rate", { item: shown.item.id, ranking: groups, comment: find("comment").value, seconds: seconds() });
const skip = () => shown?.item && send("api/rate", { item: shown.item.id, skip: true, comment: find("comment").value, seconds: seconds() });
const undo = () => shown?.undo && send("api/undo", {});

function turn() {
  view = { both: "rendered", rendered: "raw", raw: "both" }[view];
  localStorage.setItem("view", view);
  for (const panes of document.querySelectorAll(".panes")) panes.className = `panes ${view}`;
}

document.addEventListener("keydown", (event) => {
  if (event.target === find("comment")) {
    if (event.key === "Escape") find("comment").blur();
    return;
  }
  if (event.target === find("name") || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !shown) return;
  const many = shown.item && shown.item.answers.length > 2;
  const key = event.key.toLowerCase();
  if (key === "u") undo();
  else if (key === "m") turn();
  else if (!shown.item) return;
  else if (key === "s") skip();
  else if (key === "c") find("comment").focus();
  else if (key === "0" || key === "t") rate([[...shown.item.answers.keys()]]);
  else if (many && key === "backspace") unpick();
  else if (many && key >= "1" && Number(key) <= shown.item.answers.length) pick(Number(key) - 1);
  else if (!many && (key === "1" || key === "arrowleft")) rate([[0], [1]]);
  else if (!many && (key === "2" || key === "arrowright")) rate([[1], [0]]);
  else return;
  event.preventDefault();
});

find("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { status } = await ask("api/login", { name: find("name").value.trim() });
  if (status === 200) begin();
});

document.querySelector("#finished .undo").addEventListener("click", undo);

// A personal link carries the rater's name and key behind the #, which never leaves the browser by itself.
async function begin() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (link.get("rater")) {
    const { status } = await ask("api/login", { name: link.get("rater"), key: link.get("key") });
    if (status !== 200) return;
    history.replaceState(null, "", location.pathname);
  }
  const { status, found } = await ask("api/next");
  if (status === 200) show(found);
  else find("login").hidden = false;
}

begin();
