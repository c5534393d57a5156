//! The ledger of a running host, page by page from its `/api/ledger`.
//!
//! The API gives records as JSON; a record has exactly one encoding, so its bytes come back, and
//! with them chain and signatures can be checked. Nothing here is believed.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Error, Result, ensure};
use manyhands_core::swarm::chain;
use manyhands_core::swarm::ledger::Record;

use crate::http::PAGE_MAX;

/// Most bytes of a page's JSON.
pub const LEDGER_PAGE_BYTES_MAX: u64 = 64 << 20;
/// Most records of a ledger: who signs them could go on for ever.
pub const LEDGER_RECORDS_MAX: u64 = 100_000_000;
/// In which a page arrives.
const PAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of the records, in order, up to the newest one or the first that cannot be had.
pub struct LedgerPages {
    url: String,
    agent: ureq::Agent,
    next: u64,
    page: VecDeque<Record>,
    error: Option<Error>,
}

impl LedgerPages {
    /// Of the host at this address, as it printed it.
    pub fn of(url: &str) -> Self {
        let config = ureq::Agent::config_builder().timeout_global(Some(PAGE_TIMEOUT)).build();
        let url = format!("{}/api/ledger", url.trim_end_matches('/'));
        Self { url, agent: config.into(), next: 0, page: VecDeque::new(), error: None }
    }

    /// What went wrong, if the records ended before the ledger did.
    pub fn finish(self) -> Result<()> {
        self.error.map_or(Ok(()), Err)
    }

    fn fetch(&self) -> Result<VecDeque<Record>> {
        let (from, url) = (self.next, &self.url);
        ensure!(from < LEDGER_RECORDS_MAX, "the ledger has more than {LEDGER_RECORDS_MAX} records");
        let answer = self.agent.get(format!("{url}?from={from}&limit={PAGE_MAX}")).call();
        let mut answer = answer.with_context(|| {
            format!("cannot read {url}; check the address, and that the host is running")
        })?;
        let text = answer.body_mut().with_config().limit(LEDGER_PAGE_BYTES_MAX).read_to_string();
        let text = text.with_context(|| format!("cannot read a page of {url}"))?;
        let page: VecDeque<Record> = serde_json::from_str(&text)
            .with_context(|| format!("{url} is no ledger of this program's version"))?;
        ensure!(page.len() <= PAGE_MAX, "{url} sent more records than it was asked for");
        Ok(page)
    }
}

impl Iterator for LedgerPages {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.page.is_empty() && self.error.is_none() {
            match self.fetch() {
                Ok(page) => self.page = page,
                Err(error) => self.error = Some(error),
            }
        }
        let record = self.page.pop_front()?;
        self.next += 1;
        Some(chain::encode(&record))
    }
}
