// A client in TypeScript, on the types that openapi-typescript makes of the service's document (api.d.ts).
// It creates a job, polls it until it is COMPLETED, and reads it in every other way; each thing seen is a line of JSON.
// usage: node poll.js URL KEY
import createClient from 'openapi-fetch'
import type { components, paths } from './api.js'

declare const process: { argv: string[] }

type Job = components['schemas']['Job']
type JobState = components['schemas']['JobState']
type Problem = components['schemas']['Problem']

const [baseUrl = '', key = ''] = process.argv.slice(2)
const api = createClient<paths>({ baseUrl, headers: { 'X-API-Key': key } })
const say = (what: string, said: unknown) => console.log(JSON.stringify({ what, said }))

function got<T>(answer: { data?: T; error?: Problem }): T {
  if (answer.data === undefined) throw new Error(answer.error?.detail ?? 'nothing came')
  return answer.data
}

async function create(): Promise<Job> {
  const body = { type: 'extraction', batch_id: 'typed', tags: ['a', 'b'], metadata: { invoice: 4711 } }
  const job = got(await api.POST('/jobs', { body }))
  if (!('id' in job)) throw new Error('one job was asked for')
  return job
}

async function poll(job_id: string): Promise<void> {
  let etag = ''
  for (let last: JobState | '' = ''; last !== 'COMPLETED'; ) {
    const header = etag ? { 'If-None-Match': etag } : {}
    const answer = await api.GET('/jobs/{job_id}', { params: { path: { job_id }, header } })
    if (answer.response.status === 304) {
      await new Promise((resolve) => setTimeout(resolve, 20))
      continue
    }
    const job = got(answer)
    etag = answer.response.headers.get('ETag') ?? ''
    last = job.status
    say('job', { status: job.status, percentage: job.progress.percentage ?? null })
  }
}

const job = await create()
say('created', { id: job.id, pdf_name: job.pdf_name, invoice: job.metadata['invoice'] })
await poll(job.id)

const path = { job_id: job.id }
say('result', got(await api.GET('/jobs/{job_id}/result', { params: { path }, parseAs: 'json' })))

const query = { tags: ['a', 'b'], status: ['COMPLETED', 'FAILED'] satisfies JobState[] }
const page = got(await api.GET('/jobs', { params: { query } }))
say('list', { total: page.pagination.total, states: page.jobs.map((listed) => [listed.job_id, listed.status]) })

const batch = got(await api.GET('/jobs/batch/{batch_id}', { params: { path: { batch_id: 'typed' } } }))
say('batch', { status: batch.status, completed: batch.completed_jobs, overall: batch.overall_progress })

const job_ids = [job.id, 'none']
const asked = got(await api.GET('/jobs/status', { params: { query: { job_ids } } }))
const posted = got(await api.POST('/jobs/status', { body: { job_ids, include_progress: true } }))
say('many', asked.jobs.map((line) => [line.job_id, line.status, line.error?.error_type ?? null]))
say('many with progress', posted.jobs.map((line) => line.progress?.percentage ?? null))

const missing = await api.GET('/jobs/{job_id}', { params: { path: { job_id: 'none' } } })
const { status, details, suggestions } = missing.error ?? ({} as Partial<Problem>)
say('problem', { status, error_type: details?.error_type, job_id: details?.['job_id'], suggestions: suggestions?.length })

// What the document forbids does not compile.
export async function wrong(): Promise<void> {
  // @ts-expect-error a job has no such status
  await api.PATCH('/jobs/{job_id}', { params: { path }, body: { status: 'DONE' } })
  // @ts-expect-error it has to be said which job
  await api.GET('/jobs/{job_id}')
  // @ts-expect-error there is no such address
  await api.GET('/jobs/{job_id}/colour', { params: { path } })
  // @ts-expect-error it may be null
  job.pdf_name.length
}
