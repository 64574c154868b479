-- migrate:up

create table ticket_sets (
  id         text primary key,
  account_id int not null,
  job_ids    text[] not null,
  expires_at timestamptz not null
);
create index ticket_sets_by_end on ticket_sets (expires_at);
comment on table ticket_sets is 'The jobs that a ticket opens, where it opens a set: a thousand ids do not fit into an address.';

-- migrate:down

drop table ticket_sets;
