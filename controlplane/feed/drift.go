package feed

import (
	"bytes"
	"time"
)

// repairInterval is the least time between two repairs of an edge: one that drifts
// again at once must not be kept busy with its whole configuration.
const repairInterval = time.Minute

// hashes are those of configurations of an edge. They may be shared, and don't change.
type hashes struct {
	intended []byte // of the newest that was sent
	acked    []byte // of the newest that was acked
	running  []byte // of what the edge says it serves, nil: it does not say
}

// drifted says whether an edge has acked what it should serve and serves something
// else. While it refuses something it can't serve what it should.
func (e *edge) drifted() bool {
	h := e.hashes
	return e.nack == nil && h.running != nil && bytes.Equal(h.acked, h.intended) && !bytes.Equal(h.running, h.intended)
}

// intend notes what stream's edge should serve.
func (t *table) intend(stream *session, hash []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row := t.rowLocked(stream); row != nil {
		row.hashes.intended = hash
		t.changedLocked()
	}
}

// runs notes what stream's edge serves, by its own account.
func (t *table) runs(stream *session, running []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row := t.rowLocked(stream); row != nil {
		row.hashes.running = row.hashes.share(running)
		t.changedLocked()
	}
}

// compare notes that stream's edge acked a configuration and what it serves. It
// returns whether that is something else, and if so, when it may be repaired.
func (t *table) compare(stream *session, acked, running []byte) (drifted bool, repair time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	row := t.rowLocked(stream)
	if row == nil {
		return false, time.Time{}
	}
	row.hashes.acked = acked
	row.hashes.running = row.hashes.share(running)
	t.changedLocked()
	return row.drifted(), row.repaired.Add(repairInterval)
}

// share returns the equal of hash that is in memory already, if there is one.
func (h hashes) share(hash []byte) []byte {
	switch {
	case len(hash) == 0:
		return nil
	case bytes.Equal(hash, h.intended):
		return h.intended
	}
	return hash
}

// repairs notes that stream's edge is sent its configuration again. It returns false
// when it has not drifted any more.
func (t *table) repairs(stream *session) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	row := t.rowLocked(stream)
	if row == nil || !row.drifted() {
		return false
	}
	row.repaired = time.Now()
	return true
}

func (t *table) countDrifted() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	count := 0
	for _, row := range t.edges {
		if row.stream != nil && row.drifted() {
			count++
		}
	}
	return count
}

// repair is what a session does about an edge that drifted. It belongs to the methods
// of the conversation.
type repair struct {
	due   bool // the next update is the whole configuration, even if the edge acked it
	timer *time.Timer
}

func (r *repair) stop() {
	if r.timer != nil {
		r.timer.Stop()
	}
}

// compare takes what an edge that has just acked says it serves.
func (c *session) compare(running []byte) {
	if !c.answered {
		return // it is about an update that the newest has replaced
	}
	drifted, when := c.server.table.compare(c, c.target.hash, boundHash(running))
	if !drifted {
		return
	}
	c.server.config.Logger.Warn("edge serves something else than it acked", "edge", c.id,
		"revision", c.target.revision, "intended", shortHash(c.target.hash), "running", shortHash(running))
	c.repair.stop()
	c.repair.timer = time.AfterFunc(time.Until(when), func() { c.line.Do(c.sendAgain) })
}

// sendAgain has the whole configuration sent to an edge that drifted.
func (c *session) sendAgain() {
	if c.answered && c.server.table.repairs(c) {
		c.server.metrics.repairs.Inc()
		c.repair.due = true
	}
}
