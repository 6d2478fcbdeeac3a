package keyring

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// steady is a keyring that rotates only when asked to.
func steady(labels ...string) *resealv1.Resource {
	return keyringOf("default", time.Hour, 12*time.Hour, labels...)
}

func TestRotationWaitsForEveryEdge(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	var mu sync.Mutex
	early := false // somebody was told to encrypt too soon
	allAcked := false
	watch := func(n *node) {
		n.onSet = func(response *resealv1.HoldResponse) {
			mu.Lock()
			defer mu.Unlock()
			for _, e := range response.GetKeyrings()[0].GetEpochs() {
				early = early || e.GetEpoch().GetNumber() == 2 && e.GetEpoch().GetState() == active && !allAcked
			}
		}
	}
	quick, slow := r.connect("quick", watch), r.connect("slow", watch)
	quick.waitFor("default", "1 active")
	slow.waitFor("default", "1 active")
	secret := quick.secrets("default")[1]
	if len(secret) != 32 || bytes.Equal(secret, make([]byte, 32)) || !bytes.Equal(secret, slow.secrets("default")[1]) {
		t.Fatalf("edges hold %x and %x", secret, slow.secrets("default")[1])
	}
	eventually(t, "both are covered", func() bool {
		s := r.status("default")
		return len(s.GetEdges()) == 2 && s.GetEdges()[0].GetActive() == 1 && s.GetEdges()[1].GetActive() == 1
	})

	slow.hush()
	if got := r.rotate("default"); got != 2 {
		t.Errorf("rotate prepared epoch %d", got)
	}
	quick.waitFor("default", "1 active, 2 prepared")
	slow.waitFor("default", "1 active, 2 prepared")
	// Longer than an edge counts as live: a stream that lives keeps it so.
	time.Sleep(3500 * time.Millisecond)
	s := r.status("default")
	if diff := cmp.Diff([]string{"slow"}, s.GetLaggards()); diff != "" || epochs(s) != "1 active, 2 prepared" || s.GetActivationDeadline() == nil {
		t.Errorf("status is %v", s)
	}
	mu.Lock()
	allAcked = true
	mu.Unlock()
	slow.speak()
	quick.waitFor("default", "1 retired, 2 active")
	slow.waitFor("default", "1 retired, 2 active")
	mu.Lock()
	defer mu.Unlock()
	if early {
		t.Error("an edge was told to encrypt before every edge had acked")
	}
	eventually(t, "the old epoch has settled", func() bool { return strings.Contains(f.values("keyring/")["keyring/default"], `"settled":true`) })
	if s := r.status("default"); len(s.GetLaggards()) > 0 || s.GetNextRotation() == nil || s.GetEpochs()[0].GetEraseAt() == nil {
		t.Errorf("status is %v", s)
	}
}

func TestPartitionedEdgeDelaysOnlyToTheDeadline(t *testing.T) {
	t.Parallel()
	f := newFleet(t, keyringOf("default", 6*time.Second, time.Hour))
	r := f.start("r1")
	r.waitFor("default", "1 active")
	sound, cut := r.connect("sound"), r.connect("cut", mute)
	sound.waitFor("default", "1 active")
	// It is rotated without an operator.
	sound.waitFor("default", "1 active, 2 prepared")
	s := r.status("default")
	sound.waitFor("default", "1 retired, 2 active")
	activated := time.Now()
	if deadline := s.GetActivationDeadline().AsTime(); activated.Before(deadline) || s.GetActivationDeadline() == nil {
		t.Errorf("active at %s, before the deadline %s", activated, deadline)
	}
	if diff := cmp.Diff([]string{"cut"}, r.status("default").GetLaggards()); diff != "" {
		t.Error(diff)
	}
	eventually(t, "the log names the laggard", func() bool { return strings.Contains(f.log.String(), "laggards=cut") })
	// After healing it gets all at once.
	cut.speak()
	cut.waitFor("default", "1 retired, 2 active")
	eventually(t, "no laggards", func() bool { return len(r.status("default").GetLaggards()) == 0 })
}

func TestEdgeThatLeftCountsAsLiveForAWhile(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	here, gone := r.connect("here"), r.connect("gone")
	here.waitFor("default", "1 active")
	gone.waitFor("default", "1 active")
	time.Sleep(3100 * time.Millisecond) // the fleet is known now
	gone.leave()
	left := time.Now()
	r.rotate("default")
	here.waitFor("default", "1 active, 2 prepared")
	eventually(t, "only the edge that left lags", func() bool {
		s := r.status("default")
		return slices.Equal(s.GetLaggards(), []string{"gone"}) || epochs(s) != "1 active, 2 prepared"
	})
	here.waitFor("default", "1 retired, 2 active")
	if took := time.Since(left); took < time.Second {
		t.Errorf("active after %s", took)
	}
	eventually(t, "the edge is forgotten", func() bool { return len(r.status("default").GetEdges()) == 1 })
}

func TestErasedAfterRetireAfter(t *testing.T) {
	t.Parallel()
	f := newFleet(t, keyringOf("default", time.Hour, time.Second))
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.connect("a")
	n.waitFor("default", "1 active")
	old := n.secrets("default")[1]
	r.rotate("default")
	n.waitFor("default", "1 retired, 2 active")
	n.waitFor("default", "2 active")
	if raw := f.values("keyring/")["keyring/default"]; strings.Contains(raw, `"number":1`) {
		t.Errorf("etcd still holds %s", raw)
	}
	r.server.vault.mu.Lock()
	defer r.server.vault.mu.Unlock()
	if len(r.server.vault.secrets) != 1 {
		t.Errorf("%d secrets are kept", len(r.server.vault.secrets))
	}
	for _, secret := range r.server.vault.secrets {
		if bytes.Equal(secret, old) {
			t.Error("the erased secret is kept")
		}
	}
}

func TestSelectors(t *testing.T) {
	t.Parallel()
	all, one := keyringOf("all", time.Hour, time.Hour), keyringOf("one", time.Hour, time.Hour, "id", "a")
	f := newFleet(t, all, one)
	r := f.start("r1")
	r.waitFor("all", "1 active")
	r.waitFor("one", "1 active")
	a, b := r.connect("a"), r.connect("b")
	a.waitFor("one", "1 active")
	b.waitFor("all", "1 active")
	if b.holds("one") != "none" || len(a.response().GetKeyrings()) != 2 || bytes.Equal(a.secrets("all")[1], a.secrets("one")[1]) {
		t.Errorf("a holds %v, b holds %v", a.response(), b.response())
	}
	eventually(t, "b is not among the edges of one", func() bool {
		edges := r.status("one").GetEdges()
		return len(edges) == 1 && edges[0].GetEdge() == "a"
	})
	// An edge that is not selected delays nothing.
	b.hush()
	r.rotate("one")
	a.waitFor("one", "1 retired, 2 active")
	if got := b.responses(); got != 1 {
		t.Errorf("b got %d responses", got)
	}
	// A selector that changes moves the keys.
	moved := keyringOf("one", time.Hour, time.Hour, "id", "b")
	moved.Metadata.Uid = one.Metadata.Uid
	f.source.apply(many(moved))
	a.waitFor("one", "none")
	b.waitFor("one", "1 retired, 2 active")
}

func TestDeletedKeyringIsErased(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady(), keyringOf("other", time.Hour, time.Hour))
	r := f.start("r1")
	r.waitFor("other", "1 active")
	n := r.connect("a")
	n.waitFor("other", "1 active")
	before := n.secrets("other")[1]
	f.source.apply(nil, ref("other"))
	n.waitFor("other", "none")
	eventually(t, "the record is gone", func() bool { return f.values("keyring/")["keyring/other"] == "" })
	if n.holds("default") != "1 active" {
		t.Error("another keyring was touched")
	}

	// Made anew it has the same numbers. What was acked of the old does not count.
	n.hush()
	f.source.apply(many(keyringOf("other", time.Hour, time.Hour)))
	n.waitFor("other", "1 prepared")
	eventually(t, "the edge is known", func() bool { return len(r.status("other").GetEdges()) == 1 })
	time.Sleep(200 * time.Millisecond)
	if got := r.status("other"); epochs(got) != "1 prepared" || len(got.GetEdges()[0].GetEpochs()) > 0 {
		t.Errorf("status is %v", got)
	}
	n.speak()
	n.waitFor("other", "1 active")
	after := n.secrets("other")[1]
	if bytes.Equal(before, after) {
		t.Error("the secret is the old one")
	}
	// Replaced between two looks of the leader.
	f.source.apply(many(keyringOf("other", time.Hour, time.Hour)))
	n.waitFor("other", "2 active")
	if bytes.Equal(after, n.secrets("other")[2]) {
		t.Error("the secret is the old one")
	}
}

func TestSlowEdgeSkips(t *testing.T) {
	t.Parallel()
	_, r, n := settled(t, "slow")
	for range 5 {
		if _, err := r.client.Revoke(context.Background(), &resealv1.RevokeRequest{All: true}); err != nil {
			t.Fatal(err)
		}
	}
	r.waitFor("default", "6 active")
	if got := n.responses(); got != 1 {
		t.Errorf("%d responses without an ack", got)
	}
	n.speak()
	n.waitFor("default", "6 active")
	if got := n.responses(); got != 2 || n.response().GetSerial() != 2 {
		t.Errorf("%d responses, serial %d", got, n.response().GetSerial())
	}
}

// TestSecretsStayIn: no secret shows up in etcd, a status or the log.
func TestSecretsStayIn(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.connect("a")
	n.waitFor("default", "1 active")
	r.rotate("default")
	n.waitFor("default", "1 retired, 2 active")
	shown := []string{f.log.String(), fmt.Sprint(r.status("default"))}
	for key, value := range f.values("") {
		shown = append(shown, key+" "+value)
	}
	if len(shown) < 4 {
		t.Fatalf("etcd holds only %q", shown[2:])
	}
	secrets := f.sealer.all()
	for number, held := range n.secrets("default") {
		if !slices.ContainsFunc(secrets, func(secret []byte) bool { return bytes.Equal(secret, held) }) {
			t.Fatalf("the secret of epoch %d was not sealed", number)
		}
	}
	for _, secret := range secrets {
		for _, form := range forms(secret) {
			if i := slices.IndexFunc(shown, func(text string) bool { return strings.Contains(text, form) }); i >= 0 {
				t.Errorf("%q shows in %s", form, shown[i])
			}
		}
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	eventually(t, "it leads", func() bool { return testutil.ToFloat64(r.server.metrics.leader) == 1 })
	r.rotate("default")
	r.waitFor("default", "1 retired, 2 active")
	eventually(t, "two activations", func() bool { return testutil.ToFloat64(r.server.metrics.rotations.WithLabelValues("default")) == 2 })
	if got := testutil.CollectAndCount(&ageCollector{r.server.state}); got != 2 {
		t.Errorf("%d ages, want those of retired and active", got)
	}
	if problems, err := testutil.GatherAndLint(r.registry); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}
