// Requests to the API, with the names of fields that this server has. A token stays in this module.
let token = "";
let names = null; // our name of a field -> the server's
let askForToken = async () => "";
// Fields whose content has names of its own.
const OPAQUE = new Set(["where", "display", "columns", "max_per", "figures", "data"]);

export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.detail || `The server answered with status ${status}.`);
    this.status = status;
    this.cure = problem.cure && !this.message.includes(problem.cure) ? problem.cure : "";
  }
}

function rename(value, map) {
  if (Array.isArray(value)) return value.map((member) => rename(member, map));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, member]) => {
    const opaque = OPAQUE.has(name) || OPAQUE.has(map[name]);
    return [Object.hasOwn(map, name) ? map[name] : name, opaque ? member : rename(member, map)];
  }));
}

async function readNames() {
  const theirs = await (await fetch("page/names.json")).json();
  const pairs = Object.entries(theirs);
  names = { theirs, ours: Object.fromEntries(pairs.map(([ours, their]) => [their, ours])) };
}

// Called where the server wants a token; returns one, or a promise of it.
export function onToken(ask) {
  askForToken = ask;
}

// Returns the answer to a request; throws a Refusal, or an AbortError where `signal` ended it.
export async function ask(path, body, signal) {
  let answer;
  try {
    if (!names) await readNames();
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const options = { headers, signal, cache: "no-store" };
    if (body !== undefined) {
      options.method = "POST";
      options.body = JSON.stringify(rename(body, names.theirs));
      headers["Content-Type"] = "application/json";
    }
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { detail: "The server does not answer.", cure: "See whether it runs." });
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401 || answer.status === 403) {
    token = await askForToken(token ? content.detail : "");
    return ask(path, body, signal);
  }
  // A server that is not ready says why in an answer of its usual form.
  if (!answer.ok && !(path === "readyz" && content.status)) throw new Refusal(answer.status, content);
  return rename(content, names.ours);
}
