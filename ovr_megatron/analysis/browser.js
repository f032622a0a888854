"use strict";
// What a model wrote reaches the page as text only: every node below is made by hand, none from a string of markup.
(function () {
  const PAGE = 10;
  const NAMES = ["from", "source", "verdict", "behaviour", "least", "most", "order"];
  const index = JSON.parse(document.getElementById("browse-index").textContent);
  const at = (name) => document.getElementById("browse-" + name);
  const loaded = new Map(); // file -> promise of its responses
  const arrived = new Map(); // file -> what to call with them
  let found = [];
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

  function make(kind, looks, ...content) {
    const node = document.createElement(kind);
    if (looks) node.className = looks;
    node.append(...content);
    return node;
  }

  function choose() {
    const [from, source, verdict, behaviour, least, most, order] = NAMES.map((name) => at(name).value);
    const bit = behaviour ? 1 << index.behaviours.indexOf(behaviour) : 0;
    const which = index.sources.indexOf(source);
    found = [];
    index.files.forEach((file, number) => {
      if (from && from !== file.group) return;
      file.rows.forEach((row, place) => {
        const [own, reward, tokens, bits] = row;
        if (source && own !== which) return;
        if (verdict && (reward > 0) !== (verdict === "Right")) return;
        if (bit && !(bits & bit)) return;
        if ((least && tokens < +least) || (most && tokens > +most)) return;
        found.push([number, place, tokens]);
      });
    });
    if (order === "Last to first") found.reverse();
    if (order === "Longest first") found.sort((a, b) => b[2] - a[2]);
    if (order === "Shortest first") found.sort((a, b) => a[2] - b[2]);
  }

  function named(bits) {
    return index.behaviours.filter((_, place) => bits & (1 << place));
  }

  function piece(item, place) {
    const looks = [];
    const told = [];
    const bits = item.b ? item.b[place] : 0;
    if (item.a && item.a[place] !== null) {
      told.push(`advantage ${item.a[place]}`);
      const shade = item.s[place];
      if (shade) looks.push((shade > 0 ? "up" : "down") + Math.abs(shade));
    }
    if (item.p) {
      told.push(`probability ${item.p[place]} %`);
      if (item.p[place] < index.low) looks.push("unlikely");
    }
    if (bits) {
      looks.push("act");
      told.push(...named(bits));
    }
    if (!looks.length && !told.length) return item.x[place];
    const node = make("span", looks.join(" "), item.x[place]);
    node.title = told.join(", ");
    return node;
  }

  function card([number, place], item) {
    const [source, reward, tokens, bits] = index.files[number].rows[place];
    const response = make("pre", "response", ...item.x.map((_, i) => piece(item, i)));
    response.tabIndex = 0;
    if (item.cut) response.append(`\n[... ${item.cut.toLocaleString("en")} more characters ...]`);
    const badge = make("span", `badge ${reward > 0 ? "right" : "wrong"}`, `reward ${+reward.toPrecision(3)}`);
    const facts = [index.files[number].title, index.sources[source], `${tokens} tokens`, `answer ${item.answer}`];
    if (item.verdict) facts.push(item.verdict);
    if (item.sample !== undefined) facts.push(`sample ${item.sample}`);
    if (item.advantage !== undefined) facts.push(`mean advantage ${item.advantage.toFixed(3)}`);
    if (!item.stopped) facts.push("cut off");
    const text = make("div", "", make("pre", "", item.prompt.trim()), response, make("p", "note", badge, facts.join(" · ")));
    if (bits) text.append(make("p", "note", ...named(bits).map((name) => make("span", "badge act", name))));
    if (!item.image) return make("div", "rollout text", text);
    const image = make("img");
    const whole = make("div", "rollout image", image, text);
    image.alt = "Image of the prompt";
    image.onload = () => {
      if (image.naturalWidth > 112) whole.className = "rollout photo";
      else image.className = "small";
    };
    image.src = item.image;
    return whole;
  }

  let latest = 0;
  async function show() {
    const mine = ++latest;
    at("list").setAttribute("aria-busy", "true"); // until the texts are there
    const some = found.slice(first, first + PAGE);
    const last = Math.min(first + PAGE, found.length);
    at("count").textContent = found.length
      ? `${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${found.length.toLocaleString("en")}`
      : "None fits";
    at("back").disabled = first === 0;
    at("next").disabled = last === found.length;
    const cards = await Promise.all(some.map(async (one) => {
      const name = index.files[one[0]].files[Math.floor(one[1] / index.perFile)];
      let items;
      try {
        items = await load(name);
      } catch (error) {
        return make("p", "note", `${error.message} is not there: keep the folder ${index.folder} beside this page.`);
      }
      const item = items[one[1] % index.perFile];
      return item ? card(one, item) : make("p", "note", "The report was written anew: load this page again.");
    }));
    if (mine !== latest) return;
    at("list").replaceChildren(...cards);
    at("list").setAttribute("aria-busy", "false");
  }

  function remember() {
    const chosen = NAMES.filter((name) => at(name).value).map((name) => `${name}=${encodeURIComponent(at(name).value)}`);
    if (first) chosen.push(`first=${first}`);
    const hash = chosen.length ? "#" + chosen.join("&") : "#";
    if ((location.hash || "#") !== hash) history.replaceState(null, "", hash);
  }

  function restore() {
    const told = new URLSearchParams(location.hash.slice(1));
    for (const name of NAMES) {
      at(name).value = told.get(name) || "";
      if (at(name).selectedIndex === -1) at(name).value = ""; // no such choice any more
    }
    choose();
    first = Math.min(Math.max(0, Math.floor(+told.get("first") || 0)), Math.max(0, found.length - 1));
    show();
  }

  for (const name of NAMES) {
    at(name).addEventListener("input", () => { choose(); first = 0; remember(); show(); });
  }
  at("back").addEventListener("click", () => { first = Math.max(0, first - PAGE); remember(); show(); });
  at("next").addEventListener("click", () => { first += PAGE; remember(); show(); });
  window.addEventListener("hashchange", restore);
  document.getElementById("browser").hidden = false;
  restore();
})();
