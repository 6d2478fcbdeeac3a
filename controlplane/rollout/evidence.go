package rollout

import (
	"context"
	"fmt"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// compareInterval is the least time between two questions to all edges for what
	// they counted.
	compareInterval = time.Second
	// pastWindow is what counts as an edge's own past.
	pastWindow = 5 * time.Minute
	// longestWindow is how far back counters are kept.
	longestWindow = time.Hour
)

// evidence is what the leader found out of one stage. It belongs to the goroutine that
// leads.
type evidence struct {
	candidate int64
	entered   time.Time
	asked     time.Time
	shares    *Shares
	past      map[string]counted // of edges before the candidate; nil: not looked for yet
}

// counted is what an edge counted in some time: one share for each that is compared.
type counted struct{ backendErrors, clientErrors, backendFull, clientFull Share }

// compare compares the edges that have the candidate with the others, and with what they
// did before.
func (s *Server) compare(ctx context.Context, r *Record, f *Fleet) (*Shares, error) {
	gates := r.Policy.GetGates()
	if s.config.Stats == nil || gates.GetErrors().GetOff() && gates.GetFullHandshakes().GetOff() {
		return nil, nil
	}
	now, e := time.Now(), &s.evidence
	if e.candidate != r.Candidate {
		*e = evidence{candidate: r.Candidate}
	}
	if e.shares != nil && e.entered.Equal(r.Entered) && now.Sub(e.asked) < compareInterval && now.Sub(r.Entered) < r.Soak {
		return e.shares, nil
	}
	if e.past == nil {
		since, err := s.counted(ctx, now.Sub(r.Begun))
		if err != nil {
			return nil, err
		}
		if e.past, err = s.counted(ctx, now.Sub(r.Begun)+pastWindow); err != nil {
			return nil, err
		}
		for id, c := range e.past {
			e.past[id] = c.less(since[id])
		}
	}
	recent, err := s.counted(ctx, now.Sub(r.Entered))
	if err != nil {
		return nil, err
	}
	e.entered, e.asked, e.shares = r.Entered, now, share(r, f, recent, e.past)
	return e.shares, nil
}

// counted asks the edges for what they counted in the time just past.
func (s *Server) counted(ctx context.Context, since time.Duration) (map[string]counted, error) {
	since = min(max(since, time.Second), longestWindow)
	stats, err := s.config.Stats(ctx, since)
	if err != nil {
		return nil, fmt.Errorf("ask for what edges counted: %w", err)
	}
	edges := make(map[string]counted, len(stats.GetEdges()))
	for _, edge := range stats.GetEdges() {
		edges[edge.GetEdge()] = countedBy(edge)
	}
	return edges, nil
}

func countedBy(edge *resealv1.EdgeStats) counted {
	var c counted
	for _, pool := range edge.GetPools() {
		c.backendErrors = c.backendErrors.plus(failures(pool))
		// The first handshakes after a change of what sessions depend on are full, and
		// no sign of trouble.
		full := fullHandshakes(pool)
		meant := pool.GetMisses()["no_session"] + pool.GetMisses()["policy_changed"]
		full.Count -= min(full.Count, meant)
		c.backendFull = c.backendFull.plus(full)
	}
	for _, listener := range edge.GetListeners() {
		c.clientErrors = c.clientErrors.plus(failures(listener))
		c.clientFull = c.clientFull.plus(fullHandshakes(listener))
	}
	return c
}

func failures(s *resealv1.Stats) Share {
	var failed uint64
	for _, n := range s.GetErrors() {
		failed += n
	}
	return Share{Count: failed, Of: max(s.GetRequests(), failed)}
}

func fullHandshakes(s *resealv1.Stats) Share {
	h := s.GetHandshakes()
	return Share{Count: h.GetFull(), Of: h.GetFull() + h.GetResumedSessionId() + h.GetResumedTicket() + h.GetResumedPsk()}
}

// share adds up what edges counted that the change touches.
func share(r *Record, f *Fleet, recent, before map[string]counted) *Shares {
	var moved, others, past counted
	for _, edge := range f.Edges {
		switch {
		case !edge.Touched:
		case r.Has(edge.ID, edge.Labels):
			moved, past = moved.plus(recent[edge.ID]), past.plus(before[edge.ID])
		default:
			others = others.plus(recent[edge.ID])
		}
	}
	return &Shares{
		Errors: []Compared{
			{"requests to backends failed", moved.backendErrors, past.backendErrors, others.backendErrors, true},
			{"requests of clients failed", moved.clientErrors, past.clientErrors, others.clientErrors, true},
		},
		FullHandshakes: []Compared{
			{"handshakes with backends were full", moved.backendFull, past.backendFull, others.backendFull, false},
			{"handshakes with clients were full", moved.clientFull, past.clientFull, others.clientFull, false},
		},
	}
}

func (c counted) plus(o counted) counted {
	return counted{c.backendErrors.plus(o.backendErrors), c.clientErrors.plus(o.clientErrors), c.backendFull.plus(o.backendFull), c.clientFull.plus(o.clientFull)}
}

func (c counted) less(o counted) counted {
	return counted{c.backendErrors.less(o.backendErrors), c.clientErrors.less(o.clientErrors), c.backendFull.less(o.backendFull), c.clientFull.less(o.clientFull)}
}

func (s Share) plus(o Share) Share { return Share{s.Count + o.Count, s.Of + o.Of} }

// less is what s counted that o did not; an edge that has started again meanwhile counts
// nothing.
func (s Share) less(o Share) Share {
	return Share{s.Count - min(s.Count, o.Count), s.Of - min(s.Of, o.Of)}
}
