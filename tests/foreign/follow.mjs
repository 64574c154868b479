// Follows a job with npm's `eventsource` until the service says that there is no more; each thing heard is a line of JSON.
// usage: node follow.mjs URL KEY
import { EventSource } from 'eventsource'

const [url, key] = process.argv.slice(2)
const say = (what, more = {}) => console.log(JSON.stringify({ what, ...more }))

const source = new EventSource(url, {
  fetch: (input, init) => {
    say('request', { last_event_id: init.headers['Last-Event-ID'] ?? null })
    return fetch(input, { ...init, headers: { ...init.headers, 'X-API-Key': key } })
  },
})

source.onopen = () => say('open')
for (const name of ['status', 'progress', 'stalled', 'deleted', 'problem'])
  source.addEventListener(name, (event) => say(name, { ...JSON.parse(event.data), event_id: event.lastEventId }))

source.onerror = (event) => {
  if (source.readyState !== EventSource.CLOSED) return say('error', { message: event.message })
  say('closed', { code: event.code })
  process.exit(0)
}
