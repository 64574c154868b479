// Asks only for what has changed. usage: node poll_when_changed.mjs JOB_ID
const headers = { Authorization: `Bearer ${process.env.API_KEY}` }
let unchanged = 0

for (;;) {
  const response = await fetch(`${process.env.API_URL}/jobs/${process.argv[2]}`, { headers })
  if (response.status === 304) unchanged++
  else if (!response.ok) throw new Error(`HTTP ${response.status}`)
  else {
    headers['If-None-Match'] = response.headers.get('ETag')
    const job = await response.json()
    console.log(`version ${job.version}: ${job.status}`)
    if (['COMPLETED', 'FAILED', 'CANCELLED'].includes(job.status)) break
  }
  await new Promise((resolve) => setTimeout(resolve, 100))
}
console.log(`not changed: ${unchanged} times`)
