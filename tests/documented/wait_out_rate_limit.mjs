// Asks many times and waits as long as it is told to. usage: node wait_out_rate_limit.mjs JOB_ID TIMES
const [jobId, times] = process.argv.slice(2)

async function get(url, retries = 5) {
  for (let attempt = 0; attempt < retries; attempt++) {
    const response = await fetch(url, { headers: { 'X-API-Key': process.env.API_KEY } })
    if (response.status !== 429) return response.json()
    const delay = Number(response.headers.get('Retry-After') ?? 2 ** attempt)
    console.log(`rate limited, waiting ${delay} s`)
    await new Promise((resolve) => setTimeout(resolve, delay * 1000))
  }
  throw new Error('still rate limited')
}

for (let n = 1; n <= times; n++) {
  const job = await get(`${process.env.API_URL}/jobs/${jobId}`)
  console.log(`${n}: ${job.status}`)
}
