package main

import (
	"strings"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestEveryReasonIsExplained: each with words of its own.
func TestEveryReasonIsExplained(t *testing.T) {
	seen := map[string]bool{}
	unknown := explainMiss(resealv1.MissReason_MISS_REASON_UNSPECIFIED)
	for number := range resealv1.MissReason_name {
		reason := resealv1.MissReason(number)
		if reason == resealv1.MissReason_MISS_REASON_UNSPECIFIED {
			continue
		}
		e := explainMiss(reason)
		if e == unknown || seen[e.meaning] || seen[e.advice] || !strings.HasSuffix(e.meaning, ".") || !strings.HasSuffix(e.advice, ".") {
			t.Errorf("%v: %q", reason, e)
		}
		seen[e.meaning], seen[e.advice] = true, true
		if missByLabel(resealv1.Label(reason)) != reason {
			t.Errorf("%v is not found by its label", reason)
		}
	}
	for number := range resealv1.CloseKind_name {
		kind := resealv1.CloseKind(number)
		meaning, _ := explainClose(kind)
		if seen[meaning] || strings.Contains(meaning, "does not know") != (kind == 0) {
			t.Errorf("%v: %q", kind, meaning)
		}
		seen[meaning] = true
	}
	if e := explainMiss(missByLabel("from_the_future")); e != unknown {
		t.Errorf("a reason of a later version: %q", e)
	}
}

// statsOf are two edges' counters of one pool: misses by edge and what was
// resumed by each.
func statsOf(closes map[string]uint64, misses ...map[string]uint64) *resealv1.GetStatsResponse {
	total := &resealv1.Stats{Name: "p", Misses: map[string]uint64{}, Handshakes: &resealv1.Handshakes{}, Closes: closes}
	response := &resealv1.GetStatsResponse{Pools: []*resealv1.Stats{total}}
	for i, counts := range misses {
		own := &resealv1.Stats{Name: "p", Misses: counts, Handshakes: &resealv1.Handshakes{ResumedPsk: 10}}
		for reason, n := range counts {
			own.Handshakes.Full += n
			total.Misses[reason] += n
			total.Handshakes.Full += n
		}
		total.Handshakes.ResumedPsk += 10
		response.Edges = append(response.Edges, &resealv1.EdgeStats{Edge: []string{"a", "b", "c"}[i], Pools: []*resealv1.Stats{own}})
	}
	return response
}

func TestDiagnose(t *testing.T) {
	two := func() *resealv1.BackendPool {
		return &resealv1.BackendPool{Endpoints: []*resealv1.Endpoint{{Address: "h:1"}, {Address: "h:2"}},
			Tls: &resealv1.BackendTLS{ServerName: "h"}}
	}
	with := func(change func(*resealv1.BackendPool)) *resealv1.BackendPool {
		pool := two()
		pool.Sessions = &resealv1.Sessions{}
		change(pool)
		return pool
	}
	type counts = map[string]uint64
	for _, test := range []struct {
		name           string
		pool           *resealv1.BackendPool
		stats          *resealv1.GetStatsResponse
		needed, excess uint64
		main           string
		says           []string
	}{
		{"all is well", two(), statsOf(nil, counts{"no_session": 2}, counts{"no_session": 2}), 4, 0, "",
			[]string{"2 endpoints, 2 edges", "no more than needed; 20 handshakes were resumed"}},
		{"one more host", with(func(p *resealv1.BackendPool) { p.Tls = nil }), statsOf(nil, counts{"no_session": 6}), 2, 4, "no_session",
			[]string{"4 more than needed", "each host of the requests", "all on edge a"}},
		{"not all endpoints were needed", two(), statsOf(nil, counts{"no_session": 1, "declined": 1}), 1, 1, "declined",
			[]string{"1 more than needed", "All connections ended in good order"}},
		{"unclean closes", two(), statsOf(counts{"timeout": 5, "close_notify_both": 90, "reset_by_us": 1},
			counts{"no_session": 2, "declined_after_unclean_close": 6}, counts{"no_session": 2, "declined_after_unclean_close": 1}), 4, 7, "declined_after_unclean_close",
			[]string{"most on edge a (6)", "did not end in good order: timeout 5, reset_by_us 1", "closeTimeout"}},
		{"pool scope", with(func(p *resealv1.BackendPool) { p.Sessions.Scope = resealv1.Sessions_SCOPE_POOL }),
			statsOf(nil, counts{"no_session": 2}, counts{"no_session": 1}), 2, 1, "no_session", []string{"each edge (2 edges, sessions.scope: pool)"}},
		{"fleet sharing", with(func(p *resealv1.BackendPool) { p.Sessions.Sharing = resealv1.Sessions_SHARING_FLEET }),
			statsOf(nil, counts{"no_session": 2}, counts{"no_session": 1}), 2, 1, "no_session", []string{"each endpoint (2 endpoints, sessions.sharing: fleet)"}},
		{"both", with(func(p *resealv1.BackendPool) {
			p.Sessions.Scope, p.Sessions.Sharing = resealv1.Sessions_SCOPE_POOL, resealv1.Sessions_SHARING_FLEET
		}), statsOf(nil, counts{"no_session": 1}, counts{}), 1, 0, "", []string{"the whole pool and fleet"}},
		{"switched off", with(func(p *resealv1.BackendPool) { p.Sessions.Mode = resealv1.Sessions_MODE_OFF }),
			statsOf(nil, counts{"disabled": 50}), 2, 48, "disabled", []string{"sessions.mode: auto"}},
		{"DNS", &resealv1.BackendPool{Dns: &resealv1.DNSEndpoints{Name: "h", Port: 1}, Tls: &resealv1.BackendTLS{ServerName: "h"}},
			statsOf(nil, counts{"no_session": 3}), 1, 2, "no_session", []string{"come from DNS"}},
		{"a later version's reason", two(), statsOf(nil, counts{"no_session": 1, "moon_phase": 3}), 1, 3, "moon_phase", []string{"does not know"}},
		{"nothing", two(), &resealv1.GetStatsResponse{}, 0, 0, "", []string{"made no TLS handshake"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := diagnose("p", "", test.pool, test.stats)
			if d.Needed != test.needed || d.Excess != test.excess || d.MainReason != test.main {
				t.Errorf("needed %d, excess %d, main reason %q; want %d, %d, %q", d.Needed, d.Excess, d.MainReason, test.needed, test.excess, test.main)
			}
			var sum uint64
			for _, r := range d.Reasons {
				sum += r.Excess
			}
			if sum != d.Excess {
				t.Errorf("reasons explain %d of %d", sum, d.Excess)
			}
			text := strings.Join(d.Sentences, " ")
			for _, want := range test.says {
				if !strings.Contains(text, want) {
					t.Errorf("%q is not in %q", want, text)
				}
			}
		})
	}
}

// A backend that takes each ticket once has forgotten nothing.
func TestDiagnoseSingleUse(t *testing.T) {
	pool := &resealv1.BackendPool{Endpoints: []*resealv1.Endpoint{{Address: "h:1"}}}
	d := diagnose("p", "", pool, statsOf(nil, map[string]uint64{"no_session": 1, "declined": 30, "single_use_spent": 3}))
	text := strings.Join(d.Sentences, " ")
	for _, want := range []string{"main reason is declined", "The backend takes each TLS 1.3 ticket once", "Let the backend take tickets again"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %q", want, text)
		}
	}
	if strings.Contains(text, "forgotten") || strings.Contains(text, "good order") {
		t.Error(text)
	}
}

func TestDiagnoseSaysWhoCloses(t *testing.T) {
	stats := statsOf(nil, map[string]uint64{"no_session": 1, "expired": 2})
	stats.Pools[0].Connections = &resealv1.ConnectionStats{Opened: 100}
	stats.Pools[0].ClosesBy = map[string]uint64{"peer": 90, "us": 5}
	d := diagnose("p", "5m", &resealv1.BackendPool{Endpoints: []*resealv1.Endpoint{{Address: "h:1"}}}, stats)
	if text := strings.Join(d.Sentences, " "); !strings.Contains(text, "closes most connections itself: 90 of the 100") || !strings.Contains(text, "within the last 5m") {
		t.Error(text)
	}
}

// Connections to share out among edges, and more edges than there are.
func TestConnectionBudget(t *testing.T) {
	limit := uint32(10)
	pool := &resealv1.BackendPool{Connections: &resealv1.Connections{MaxPerFleet: &limit}}
	shared := func(shares ...int64) *resealv1.GetStatsResponse {
		stats := &resealv1.GetStatsResponse{Edges: []*resealv1.EdgeStats{{Edge: "without"}}}
		for i, n := range shares {
			stats.Edges = append(stats.Edges, &resealv1.EdgeStats{Edge: string(rune('a' + i)), Pools: []*resealv1.Stats{
				{Name: "p", Connections: &resealv1.ConnectionStats{Share: n}},
				{Name: "other", Connections: &resealv1.ConnectionStats{Share: 1000}},
			}})
		}
		return stats
	}
	for _, test := range []struct {
		limit  uint32
		shares []int64
		want   string
	}{
		{10, nil, "no edge has told its share yet"},
		{10, []int64{10}, "10 of 10 per endpoint shared out: 10 each to 1 edge"},
		{10, []int64{3, 4, 3}, "10 of 10 per endpoint shared out: 3 to 4 each to 3 edges"},
		{2, []int64{1, 1, 1}, "3 of 2 per endpoint shared out: 1 each to 3 edges; exceeded, since each edge has at least 1"},
	} {
		limit = test.limit
		if got := budgetOf("p", pool, shared(test.shares...)).String(); got != test.want {
			t.Errorf("%d shared out as %v: %q, want %q", test.limit, test.shares, got, test.want)
		}
	}
	text := strings.Join(diagnose("p", "", pool, shared(1, 1, 1)).Sentences, " ")
	if !strings.Contains(text, "connections.maxPerFleet is 2, but 3 edges have the pool") {
		t.Errorf("diagnosed: %s", text)
	}
	limit = 3
	if d := diagnose("p", "", pool, shared(1, 1, 1)); strings.Contains(strings.Join(d.Sentences, " "), "maxPerFleet") || d.ConnectionBudget.SharedOut != 3 {
		t.Errorf("diagnosed: %+v", d)
	}
	if d := diagnose("p", "", &resealv1.BackendPool{}, shared()); d.ConnectionBudget != nil {
		t.Errorf("a budget without a limit: %+v", d.ConnectionBudget)
	}
}
