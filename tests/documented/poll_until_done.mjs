// Asks every half second until the job is done. usage: node poll_until_done.mjs JOB_ID [MAX_WAIT_SECONDS]
const { API_URL, API_KEY } = process.env
const [jobId, maxWait = 300] = process.argv.slice(2)

async function waitForJob(id, interval = 500) {
  const started = Date.now()
  while (Date.now() - started < maxWait * 1000) {
    const response = await fetch(`${API_URL}/jobs/${id}`, { headers: { 'X-API-Key': API_KEY } })
    if (!response.ok) throw new Error(`HTTP ${response.status}`)
    const job = await response.json()
    console.log(`status: ${job.status}`)
    if (job.status === 'COMPLETED') return job
    if (job.status === 'FAILED') throw new Error(`${job.pdf_name} failed: ${job.error}`)
    await new Promise((resolve) => setTimeout(resolve, interval))
  }
  throw new Error(`job ${id} was not done within ${maxWait} seconds`)
}

try {
  const job = await waitForJob(jobId)
  console.log(`${job.pdf_name} (${job.type}) took from ${job.created_at} to ${job.updated_at}`)
} catch (error) {
  console.error(error.message)
  process.exit(1)
}
