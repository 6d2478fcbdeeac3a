package feed

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// A late answer may cross the next update on the wire.
func TestLateAckCrossesUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		stream := p.hello("e1", &resealv1.Hello{Edge: "e1"})
		receive := func() int64 {
			message, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			return message.GetUpdate().GetRevision()
		}
		send := func(message *resealv1.SyncRequest) {
			if err := stream.Send(message); err != nil {
				t.Fatal(err)
			}
			settle(0)
		}
		receive()
		send(&resealv1.SyncRequest{Message: &resealv1.SyncRequest_Nack{Nack: &resealv1.Nack{Revision: 1}}})
		s.apply(many(pool("app", "a:2")))
		if got := receive(); got != 2 {
			t.Fatalf("got revision %d", got)
		}
		send(ack(1))
		if edge := p.edge("e1"); edge.GetAckedRevision() != 1 || edge.GetNack() != nil || edge.GetState() != resealv1.Edge_STATE_SYNCING {
			t.Errorf("listed as %v", edge)
		}
		send(ack(2))
		if edge := p.edge("e1"); edge.GetAckedRevision() != 2 || edge.GetState() != resealv1.Edge_STATE_SYNCED {
			t.Errorf("listed as %v", edge)
		}
		// After the answer to the newer one it is too late.
		send(ack(1))
		if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ended with %v", err)
		}
	})
}

// A revision has converged with the last ack of the edges that live.
func TestConvergence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		settle(time.Hour)
		p.node("quick", nil, newDisk())
		slow := p.node("slow", nil, newDisk(), func(n *node) { n.slow = 5 * time.Second })
		settle(10 * time.Second)
		samples := func() (uint64, float64) {
			families, err := p.registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, family := range families {
				if family.GetName() == "reseal_convergence_seconds" {
					histogram := family.GetMetric()[0].GetHistogram()
					return histogram.GetSampleCount(), histogram.GetSampleSum()
				}
			}
			t.Fatal("there is no reseal_convergence_seconds")
			return 0, 0
		}
		if n, _ := samples(); n != 0 {
			t.Errorf("%d samples, though no revision came while edges lived", n)
		}
		s.apply(many(pool("app", "a:2")))
		settle(10 * time.Second)
		if n, sum := samples(); n != 1 || sum != 5 {
			t.Errorf("%d samples, %gs", n, sum)
		}
		if got := p.edge("slow").GetConvergence().AsDuration(); got != 5*time.Second {
			t.Errorf("the slow edge took %s", got)
		}
		// An edge that left is waited for as long as it counts as live.
		slow.stop()
		s.apply(many(pool("app", "a:3")))
		settle(20 * time.Second)
		if n, _ := samples(); n != 1 {
			t.Errorf("%d samples while an edge is away", n)
		}
		settle(20 * time.Second)
		if n, sum := samples(); n != 2 || sum != 5 {
			t.Errorf("%d samples, %gs", n, sum)
		}
	})
}

// The count of acks that a revision lacks is what a look at all edges would give.
func TestMissingAcksAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var converged int
		table := newTable(func(time.Duration) { converged++ })
		random := rand.New(rand.NewPCG(1, 2))
		streams := map[string]*session{}
		revision := int64(0)
		for step := range 3_000 {
			id := fmt.Sprint("e", random.IntN(12))
			switch random.IntN(10) {
			case 0:
				revision++
				table.publish(revision, time.Now())
			case 1:
				streams[id] = &session{id: id}
				if _, _, err := table.connect(streams[id], &resealv1.Hello{Edge: id, BootId: fmt.Sprint(random.IntN(2))}, ""); err != nil {
					t.Fatal(err)
				}
			case 2:
				if stream := streams[id]; stream != nil && random.IntN(3) == 0 {
					table.disconnect(stream)
				}
			case 3:
				time.Sleep(time.Duration(random.IntN(3)) * time.Second)
				table.expire()
			case 4:
				if random.IntN(100) == 0 {
					table.startAnew()
				}
			default:
				if stream := streams[id]; stream != nil {
					table.acked(stream, max(0, revision-int64(random.IntN(3))), time.Now(), 1)
				}
			}
			for _, p := range table.converging {
				missing := 0
				for _, row := range table.edges {
					if row.acked < p.revision {
						missing++
					}
				}
				if missing != p.missing {
					t.Fatalf("step %d: revision %d lacks %d acks, counted %d", step, p.revision, missing, p.missing)
				}
			}
		}
		if converged < 20 {
			t.Errorf("only %d revisions converged", converged)
		}
	})
}

// An edge that can serve a part of a revision is not taken for one that refuses it.
func TestPartlyIsAState(t *testing.T) {
	row := &edge{stream: &session{}, nack: &resealv1.Nack{Revision: 3, Partly: true}}
	if got := row.state(3); got != resealv1.Edge_STATE_PARTLY {
		t.Errorf("%v", got)
	}
	if got := row.state(4); got != resealv1.Edge_STATE_SYNCING {
		t.Errorf("%v when the nack is of an older revision", got)
	}
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		p.node("a", nil, newDisk())
		p.node("b", nil, newDisk(), func(n *node) { n.refuse = refusePool("bad:1") })
		p.node("c", nil, newDisk()).stop()
		settle(0)
		s.apply(many(pool("app", "bad:1")))
		settle(0)
		want := `
# HELP reseal_config_revision The newest revision that edges should serve.
# TYPE reseal_config_revision gauge
reseal_config_revision 2
# HELP reseal_edges Live edges by state.
# TYPE reseal_edges gauge
reseal_edges{state="disconnected"} 1
reseal_edges{state="draining"} 0
reseal_edges{state="partly"} 0
reseal_edges{state="refused"} 1
reseal_edges{state="synced"} 1
reseal_edges{state="syncing"} 0
# HELP reseal_feed_nacks_total Updates that edges refused.
# TYPE reseal_feed_nacks_total counter
reseal_feed_nacks_total 1
`
		// The stopped edge may have left before or after its Hello.
		if p.edge("c").GetId() == "" {
			want = strings.Replace(want, `"disconnected"} 1`, `"disconnected"} 0`, 1)
		}
		names := []string{"reseal_config_revision", "reseal_edges", "reseal_feed_nacks_total"}
		if err := testutil.GatherAndCompare(p.registry, strings.NewReader(want), names...); err != nil {
			t.Error(err)
		}
		if problems, err := testutil.GatherAndLint(p.registry); err != nil || len(problems) > 0 {
			t.Error(problems, err)
		}
	})
}

func TestTableIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newTable(func(time.Duration) {})
		connect := func(i int) (*session, error) {
			stream := &session{id: fmt.Sprint(i)}
			_, _, err := table.connect(stream, &resealv1.Hello{Edge: stream.id}, "")
			return stream, err
		}
		var first, second *session
		for i := range maxEdges {
			stream, err := connect(i)
			if err != nil {
				t.Fatal(err)
			}
			switch i {
			case 0:
				first = stream
			case 1:
				second = stream
			}
		}
		if _, err := connect(-1); !errors.Is(err, resealv1.ErrTooManyEdges) {
			t.Errorf("one edge too many: %v", err)
		}
		// Room is made by the edge that left first.
		table.disconnect(second)
		time.Sleep(time.Second)
		table.disconnect(first)
		if _, err := connect(-1); err != nil {
			t.Error(err)
		}
		if table.edges[second.id] != nil || table.edges[first.id] == nil || len(table.edges) != maxEdges {
			t.Error("the wrong edge was forgotten")
		}
		for i := range 10 * maxConverging {
			table.publish(int64(i), time.Now())
		}
		if len(table.converging) != maxConverging {
			t.Errorf("%d revisions converge", len(table.converging))
		}
	})
}

func TestNackIsBounded(t *testing.T) {
	nack := &resealv1.Nack{Revision: 3, ServingRevision: 2, Partly: true}
	for range 2 * maxViolations {
		nack.HeldBack = append(nack.HeldBack, ref(strings.Repeat("K", 1000), strings.Repeat("n", 1000)))
		nack.Violations = append(nack.Violations, &resealv1.Violation{
			Resource: ref(strings.Repeat("K", 1000), strings.Repeat("n", 1000)), Field: strings.Repeat("f", 1000), Description: strings.Repeat("ä", 10000),
		})
	}
	got := boundNack(nack)
	if got.GetRevision() != 3 || got.GetServingRevision() != 2 || !got.GetPartly() || len(got.GetViolations()) != maxViolations || len(got.GetHeldBack()) != maxViolations {
		t.Errorf("kept %d violations, %d names", len(got.GetViolations()), len(got.GetHeldBack()))
	}
	if size := len(got.GetHeldBack()[0].Key()); size > 2*maxText+1 {
		t.Errorf("kept a name of %d bytes", size)
	}
	for _, violation := range got.GetViolations() {
		if len(violation.GetDescription()) > maxDescription || len(violation.GetField()) > maxField || len(violation.GetResource().Key()) > 2*maxText+1 || !utf8.ValidString(violation.GetDescription()) {
			t.Fatalf("kept %v", violation)
		}
	}
	small := &resealv1.Nack{Revision: 1, Violations: []*resealv1.Violation{{Resource: ref("Route", "r"), Field: "spec", Description: "no"}, {Description: "all of it"}}}
	if diff := cmp.Diff(small, boundNack(small), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestNackIsLegible(t *testing.T) {
	const evil = "no\x1b[2J\a\u202e\nsuch"
	nack := boundNack(&resealv1.Nack{
		HeldBack:   []*resealv1.ResourceRef{ref("Route", evil)},
		Violations: []*resealv1.Violation{{Resource: ref(evil, "r"), Field: evil, Description: strings.Repeat("\x1b", maxDescription)}, {Description: evil}},
	})
	for _, text := range []string{nack.GetHeldBack()[0].GetName(), nack.GetViolations()[0].GetResource().GetKind(), nack.GetViolations()[0].GetField(), nack.GetViolations()[1].GetDescription()} {
		if text != `no\x1b[2J\x07\u202e\nsuch` {
			t.Errorf("kept %q", text)
		}
	}
	if text := nack.GetViolations()[0].GetDescription(); len(text) > maxDescription || !resealv1.Legible(text) {
		t.Errorf("kept %d bytes: %q", len(text), text)
	}
}

func TestReportIsLegible(t *testing.T) {
	const evil, shown = "Jetty\x1b[2J\u202e", `Jetty\x1b[2J\u202e`
	report := func(text, lines string) *resealv1.ProbeReport {
		return &resealv1.ProbeReport{
			Id: 1, Alpn: text, Notes: []string{"fine", text}, Versions: []*resealv1.ProbeVersion{{Tickets: 2, Unresumed: text}},
			Pool: &resealv1.BackendPool{
				Endpoints: []*resealv1.Endpoint{{Address: text}},
				Tls:       &resealv1.BackendTLS{Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: lines}}},
			},
		}
	}
	got := report(evil, "one\ntwo"+evil)
	if err := boundReport(got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(report(shown, "one\ntwo"+shown), got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if err := boundReport(&resealv1.ProbeReport{Notes: []string{strings.Repeat("x", maxReport)}}); err == nil {
		t.Error("a report may have any size")
	}
	labels := &resealv1.Edge{Labels: map[string]string{evil: evil, "zone": evil, "tier": "front"}}
	makeVisible(labels.ProtoReflect())
	if diff := cmp.Diff(map[string]string{shown: shown, "zone": shown, "tier": "front"}, labels.GetLabels()); diff != "" {
		t.Error(diff)
	}
}

// Applying a difference to what was gives what is.
func TestDifference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) []*resealv1.EncodedResource {
			var held []*resealv1.EncodedResource
			drawn := rapid.MapOfN(rapid.StringMatching(`[ab]{1,2}`), rapid.SliceOfN(rapid.Byte(), 0, 1), 0, 6).Draw(t, name)
			for key, data := range drawn {
				held = append(held, &resealv1.EncodedResource{Kind: key[:1], Name: key[1:], Resource: data})
			}
			resealv1.HashEncoded(held) // sorts
			return held
		}
		before, after := draw("before"), draw("after")
		upserts, deletes := difference(before, after)
		held := map[string]*resealv1.EncodedResource{}
		for _, r := range before {
			held[r.Kind+"/"+r.Name] = r
		}
		for _, d := range deletes {
			if held[d.Key()] == nil {
				t.Fatalf("deletes %s, which is not there", d.Key())
			}
			delete(held, d.Key())
		}
		for _, r := range upserts {
			if old := held[r.Kind+"/"+r.Name]; old != nil && string(old.Resource) == string(r.Resource) {
				t.Fatalf("sends %s again", r.Name)
			}
			held[r.Kind+"/"+r.Name] = r
		}
		var got []*resealv1.EncodedResource
		for _, r := range held {
			got = append(got, r)
		}
		if string(resealv1.HashEncoded(got)) != string(resealv1.HashEncoded(after)) {
			t.Fatalf("from %v to %v: upserts %v, deletes %v", before, after, upserts, deletes)
		}
	})
}
