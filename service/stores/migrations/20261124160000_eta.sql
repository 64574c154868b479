-- migrate:up

create function eta(job jobs) returns timestamptz language sql stable parallel safe as $$
  select case when job.status = 'PROCESSING' and not job.stalled
                   and job.pace_reached - job.pace_start >= 5 and job.pace_reached_at - job.attempt_started_at >= interval '1 second'
                   and job.changed_at - job.pace_reached_at <= 25 * job.pace_point_s * interval '1 second'
                   and job.changed_at < job.pace_reached_at + (100 - job.pace_reached) * job.pace_point_s * interval '1 second'
              then job.pace_reached_at + (100 - job.pace_reached) * job.pace_point_s * interval '1 second' end
$$;
comment on function eta is
  'When a job will be done if it goes on at its pace, as its last change leaves it: later than that change, or null for unknown. '
  'Unknown unless 5 points and a second of the attempt were measured, and after no progress for as long as 25 points take. '
  'It stays the same until the percentage moves by a point.';

-- migrate:down

drop function eta;
