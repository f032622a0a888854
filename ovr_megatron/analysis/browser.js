"use strict";
// What a model wrote reaches the page as text only: cards are copies of the page's empty one, none is made from markup.
(function () {
  const PAGE = 10;
  const NAMES = ["from", "source", "verdict", "behaviour", "least", "most", "order"];
  const index = JSON.parse(document.getElementById("browse-index").textContent);
  const emptyCard = document.getElementById("browse-card").content.firstElementChild;
  const field = (name) => document.getElementById("browse-" + name);
  const loaded = new Map(); // file -> promise of its responses
  const arrived = new Map(); // file -> what to call with them
  let matches = []; // [file, row, tokens] of each response that the filters let through
  let first = 0;

  window.ovrShow = (name, items) => arrived.get(name)?.(items);

  function load(name) {
    if (!loaded.has(name)) {
      loaded.set(name, new Promise((resolve, reject) => {
        arrived.set(name, resolve);
        const script = document.createElement("script");
        script.src = `${index.folder}/${encodeURIComponent(name)}.js`;
        script.onerror = () => { loaded.delete(name); reject(new Error(script.src)); };
        document.head.append(script);
      }));
    }
    return loaded.get(name);
  }

  function filter() {
    const [from, source, verdict, behaviour, least, most, order] = NAMES.map((name) => field(name).value);
    const bit = behaviour ? 1 << index.behaviours.indexOf(behaviour) : 0;
    const sourceIndex = index.sources.indexOf(source);
    matches = [];
    index.files.forEach((file, fileIndex) => {
      if (from && from !== file.group) return;
      file.rows.forEach(([rowSource, reward, tokens, bits], rowIndex) => {
        if (source && rowSource !== sourceIndex) return;
        if (verdict && (reward > 0) !== (verdict === "Right")) return;
        if (bit && !(bits & bit)) return;
        if ((least && tokens < +least) || (most && tokens > +most)) return;
        matches.push([fileIndex, rowIndex, tokens]);
      });
    });
    if (order === "Last to first") matches.reverse();
    if (order === "Longest first") matches.sort((a, b) => b[2] - a[2]);
    if (order === "Shortest first") matches.sort((a, b) => a[2] - b[2]);
  }

  function behaviourNames(bits) {
    return index.behaviours.filter((_, bit) => bits & (1 << bit));
  }

  // The same looks and titles as those of `describe_token` in response_card.py, and behaviours.
  function piece(item, i) {
    const looks = [];
    const titles = [];
    if (item.p && item.p[i] < index.low) looks.push("unlikely");
    if (item.a && item.a[i] !== null) {
      titles.push(`advantage ${item.a[i] < 0 ? "" : "+"}${item.a[i].toFixed(3)}`);
      const shade = item.s[i];
      if (shade) looks.push((shade > 0 ? "up" : "down") + Math.abs(shade));
    }
    if (item.p) titles.push(`probability ${item.p[i].toFixed(3)}`);
    if (item.b && item.b[i]) {
      looks.push("act");
      titles.push(...behaviourNames(item.b[i]));
    }
    if (!titles.length) return item.x[i];
    const node = document.createElement("span");
    if (looks.length) node.className = looks.join(" ");
    node.title = titles.join(", ");
    node.textContent = item.x[i];
    return node;
  }

  function card([fileIndex, rowIndex], item) {
    const file = index.files[fileIndex];
    const node = emptyCard.cloneNode(true);
    const part = (name) => node.querySelector("." + name);
    part("prompt").textContent = item.prompt;
    part("response").append(...item.x.map((_, i) => piece(item, i)));
    if (item.cut) part("response").append(`\n[... ${item.cut.toLocaleString("en")} more characters ...]`);
    part("badge").textContent = item.badge;
    part("badge").classList.add(item.badge_kind);
    part("facts").textContent = `${file.title} · ${item.facts}`;
    const names = behaviourNames(file.rows[rowIndex][3]);
    const emptyBadge = node.querySelector(".behaviours .badge");
    part("behaviours").replaceChildren(...names.map((name) => {
      const badge = emptyBadge.cloneNode(true);
      badge.textContent = name;
      return badge;
    }));
    if (!names.length) part("behaviours").remove();
    showImage(node, item.image);
    return node;
  }

  function showImage(node, address) {
    const image = node.querySelector("img");
    node.classList.add(address ? "image" : "text");
    if (!address) return image.remove();
    image.onload = () => {
      if (image.naturalWidth > 112) node.classList.replace("image", "photo");
      else image.className = "small";
    };
    image.src = address;
  }

  function note(text) {
    const node = document.createElement("p");
    node.className = "note";
    node.textContent = text;
    return node;
  }

  async function loadCard(match) {
    const [fileIndex, rowIndex] = match;
    let items;
    try {
      items = await load(index.files[fileIndex].files[Math.floor(rowIndex / index.perFile)]);
    } catch (error) {
      return note(`${error.message} is not there: keep the folder ${index.folder} beside this page.`);
    }
    const item = items[rowIndex % index.perFile];
    return item ? card(match, item) : note("The report was written anew: load this page again.");
  }

  let latest = 0;
  async function show() {
    const request = ++latest;
    field("list").setAttribute("aria-busy", "true"); // until the texts are there
    const last = Math.min(first + PAGE, matches.length);
    field("count").textContent = matches.length
      ? `${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${matches.length.toLocaleString("en")}`
      : "None fits";
    field("back").disabled = first === 0;
    field("next").disabled = last === matches.length;
    const cards = await Promise.all(matches.slice(first, last).map(loadCard));
    if (request !== latest) return;
    field("list").replaceChildren(...cards);
    field("list").setAttribute("aria-busy", "false");
  }

  function remember() {
    const values = NAMES.filter((name) => field(name).value);
    const settings = values.map((name) => `${name}=${encodeURIComponent(field(name).value)}`);
    if (first) settings.push(`first=${first}`);
    const hash = settings.length ? "#" + settings.join("&") : "#";
    if ((location.hash || "#") !== hash) history.replaceState(null, "", hash);
  }

  function restore() {
    const settings = new URLSearchParams(location.hash.slice(1));
    for (const name of NAMES) {
      field(name).value = settings.get(name) || "";
      if (field(name).selectedIndex === -1) field(name).value = ""; // no such choice any more
    }
    filter();
    first = Math.min(Math.max(0, Math.floor(+settings.get("first") || 0)), Math.max(0, matches.length - 1));
    show();
  }

  for (const name of NAMES) {
    field(name).addEventListener("input", () => { filter(); first = 0; remember(); show(); });
  }
  field("back").addEventListener("click", () => { first = Math.max(0, first - PAGE); remember(); show(); });
  field("next").addEventListener("click", () => { first += PAGE; remember(); show(); });
  window.addEventListener("hashchange", restore);
  document.getElementById("browser").hidden = false;
  restore();
})();
