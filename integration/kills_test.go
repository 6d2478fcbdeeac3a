package integration

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/integration/fleetsim"
	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// order is a change that somebody asks a replica for, and what is known of it: exactly
// one of revision, conflict and unknown is set.
type order struct {
	message  string // unique
	expected int64  // 0: any revision
	back     bool   // a rollback to the revision before
	value    string // otherwise what is applied

	revision int64 // done
	backTo   int64
	conflict int64 // refused, since this is the revision
	unknown  bool  // the replica went away
}

// changes is the model of what the replicas keep together: the revisions so far, with the
// value of each, as "revision=value" separated by spaces.
type changes string

func (c changes) last() (revision int64, before changes) {
	i := strings.LastIndexByte(string(c), ' ')
	number, _, _ := strings.Cut(string(c[i+1:]), "=")
	revision, _ = strconv.ParseInt(number, 10, 64)
	return revision, c[:max(i, 0)]
}

// take says whether an order can have ended so at this point, and what then is.
func (c changes) take(o order) (bool, changes) {
	current, before := c.last()
	if o.conflict > 0 {
		return o.conflict == current && o.expected != current, c
	}
	if o.expected != 0 && o.expected != current || o.revision <= current {
		return false, c
	}
	value := o.value
	if o.back {
		to, _ := before.last()
		if o.backTo != to {
			return false, c
		}
		value = fmt.Sprint("as-of-", to)
	}
	return true, c + changes(fmt.Sprintf(" %d=%s", o.revision, value))
}

// killed are replicas of which one dies again and again.
type killed struct {
	*replicated
	admins []*fleetsim.Admin
	began  time.Time

	mu     sync.Mutex
	orders []porcupine.Operation
}

// ask gives an order to any replica, and notes what became of it.
func (k *killed) ask(ctx context.Context, worker int, o order) (revision int64) {
	service := k.admins[rand.N(len(k.admins))].Service()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var err error
	call := time.Since(k.began)
	if o.back {
		var answer *resealv1.RollbackResponse
		answer, err = service.Rollback(ctx, &resealv1.RollbackRequest{ExpectedRevision: o.expected, Message: o.message})
		o.revision, o.backTo = answer.GetRevision(), answer.GetRolledBackTo()
	} else {
		policy := resealv1.NewResource("TLSPolicy")
		policy.Metadata = &resealv1.Metadata{Name: "changing", Annotations: map[string]string{"value": o.value}}
		var answer *resealv1.ApplyResponse
		answer, err = service.Apply(ctx, &resealv1.ApplyRequest{
			Resources: []*resealv1.Resource{policy}, ExpectedRevision: o.expected, Message: o.message,
		})
		o.revision = answer.GetRevision()
	}
	end := time.Since(k.began)
	if err != nil {
		if o.conflict = conflictOf(err); o.conflict == 0 {
			o.unknown = true
			if code := status.Code(err); code != codes.Unavailable && code != codes.DeadlineExceeded && ctx.Err() == nil {
				k.t.Errorf("%+v: %v", o, err)
			}
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.orders = append(k.orders, porcupine.Operation{ClientId: worker, Input: o, Call: int64(call), Return: int64(end)})
	return max(o.revision, o.conflict)
}

// conflictOf is the current revision that a conflict tells, 0 for other errors.
func conflictOf(err error) int64 {
	if status.Code(err) != codes.Aborted {
		return 0
	}
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			revision, _ := strconv.ParseInt(info.GetMetadata()["revision"], 10, 64)
			return revision
		}
	}
	return 0
}

// change asks for changes until ctx ends.
func (k *killed) change(ctx context.Context, worker int) {
	var known int64
	for i := 0; ctx.Err() == nil; i++ {
		o := order{message: fmt.Sprintf("%d/%d", worker, i), value: fmt.Sprintf("%d-%d", worker, i)}
		switch i % 4 {
		case 1:
			o.expected = known
		case 3:
			o.back, o.value = true, ""
		}
		if revision := k.ask(ctx, worker, o); revision > 0 {
			known = revision
		}
		select {
		case <-time.After(time.Duration(50+rand.N(100)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// gaps measures the longest time that an edge had no feed, until ctx ends.
func (k *killed) gaps(ctx context.Context, edge *harness.Edge) (longest time.Duration) {
	last := time.Now()
	for ctx.Err() == nil {
		if connected(ctx, edge) {
			longest, last = max(longest, time.Since(last)), time.Now()
		}
		time.Sleep(50 * time.Millisecond)
	}
	return max(longest, time.Since(last))
}

func connected(ctx context.Context, edge *harness.Edge) bool {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+edge.Admin+"/metrics", nil)
	if err != nil {
		return false
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return false
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return err == nil && strings.Contains(string(text), "\nreseal_feed_connected 1\n")
}

// check compares what was answered with the history that the replicas keep.
func (k *killed) check() {
	history, err := k.admins[0].Service().ListRevisions(k.t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil {
		k.t.Fatal(err)
	}
	kept := map[string]*resealv1.Revision{}
	for _, revision := range history.GetRevisions() {
		if revision.GetMessage() != "" && kept[revision.GetMessage()] != nil {
			k.t.Errorf("the order %s was carried out twice", revision.GetMessage())
		}
		kept[revision.GetMessage()] = revision
	}
	var operations []porcupine.Operation
	done, refused, unknown := 0, 0, 0
	for _, operation := range k.orders {
		o := operation.Input.(order)
		revision := kept[o.message].GetRevision()
		switch {
		case o.conflict > 0:
			refused++
		case o.unknown && revision == 0:
			unknown++
			continue // it was not carried out
		case o.unknown:
			unknown++
			o.revision, o.backTo = revision, kept[o.message].GetRolledBackTo()
			operation.Return = math.MaxInt64
		default:
			done++
		}
		if o.conflict == 0 && revision != o.revision {
			k.t.Errorf("%+v: the history has it at %d", o, revision)
		}
		operation.Input = o
		operations = append(operations, operation)
	}
	if done < 10 || refused == 0 {
		k.t.Errorf("%d orders were carried out and %d refused: too few to say much", done, refused)
	}
	var start changes // what was before the orders
	for i := len(history.GetRevisions()) - 1; i >= 0; i-- {
		if revision := history.GetRevisions()[i]; revision.GetMessage() == "" {
			start += changes(fmt.Sprintf(" %d=", revision.GetRevision()))
		}
	}
	model := porcupine.Model{
		Init: func() any { return start },
		Step: func(state, input, _ any) (bool, any) {
			ok, next := state.(changes).take(input.(order))
			return ok, next
		},
	}
	begun := time.Now()
	result, info := porcupine.CheckOperationsVerbose(model, operations, time.Minute)
	if result != porcupine.Ok {
		k.t.Errorf("%d orders are not linearizable: %s. %s", len(operations), result, stuck(operations, info))
	}
	k.t.Logf("%d orders carried out, %d refused by a conflict, %d without an answer: %s, found in %v",
		done, refused, unknown, result, time.Since(begun).Round(time.Millisecond))
}

// stuck tells of the longest order of operations that was found, and what can't follow.
func stuck(operations []porcupine.Operation, info porcupine.LinearizationInfo) string {
	var longest []int
	for _, found := range info.PartialLinearizations()[0] {
		if len(found) > len(longest) {
			longest = found
		}
	}
	rest := map[int]bool{}
	for i := range operations {
		rest[i] = true
	}
	text := "In a row:"
	for place, i := range longest {
		delete(rest, i)
		if place >= len(longest)-5 {
			text += fmt.Sprintf("\n\t%+v", operations[i])
		}
	}
	text += "\nbut then none of:"
	for n, i := range slices.SortedFunc(maps.Keys(rest), func(a, b int) int { return cmp.Compare(operations[a].Call, operations[b].Call) }) {
		if n < 8 {
			text += fmt.Sprintf("\n\t%+v", operations[i])
		}
	}
	return text
}

// TestReplicasKilled: while replicas are killed one after the other, under changes and
// rotations, nothing that was answered is lost or out of order, no edge is without a feed
// for long, and afterwards all replicas say the same.
func TestReplicasKilled(t *testing.T) {
	kills, every := 5, 4*time.Second
	if harness.Long() {
		kills, every = 30, 10*time.Second
	}
	k := &killed{replicated: newReplicated(t, 3, "--history-limit", "10000"), began: time.Now()}
	backend := k.Launch(t, peers.Go, peers.Options{})
	var addresses []string
	for _, replica := range k.replicas {
		addresses = append(addresses, replica.Address)
		admin, err := fleetsim.NewAdmin(filepath.Join(k.replicas[0].DataDir, "admin.yaml"), replica.Address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = admin.Close() })
		k.admins = append(k.admins, admin)
	}
	var edges []*harness.Edge
	var all []string
	manifest := harness.Certificate("site", k.Pair) + k.Pool("app", []*peers.Backend{backend}, "")
	for i := range 3 {
		id := fmt.Sprint("e", i)
		edges = append(edges, k.StartEdge(id, "edge="+id, "--control-plane", strings.Join(addresses, ",")))
		all = append(all, id+" synced")
		manifest += harness.Listener(id, k.Address(), "edge: "+id, "  pool: app\n")
	}
	k.WaitAcked(k.Apply(manifest), edges...)

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var working sync.WaitGroup
	for worker := range 3 {
		working.Go(func() { k.change(ctx, worker) })
	}
	gaps := make([]time.Duration, len(edges))
	for i, edge := range edges {
		working.Go(func() { gaps[i] = k.gaps(ctx, edge) })
	}
	working.Go(func() {
		for ctx.Err() == nil {
			_, _ = k.admins[rand.N(len(k.admins))].Rotate(ctx) // it is refused while one is under way
			time.Sleep(time.Second)
		}
	})
	for i := range kills {
		time.Sleep(every / 2)
		replica := k.replicas[i%len(k.replicas)]
		replica.Kill()
		time.Sleep(every / 2)
		replica.Start()
	}
	time.Sleep(every / 2)
	stop()
	working.Wait()

	for i, gap := range gaps {
		t.Logf("%s was without a feed for %v at most", edges[i].ID, gap.Round(10*time.Millisecond))
		if gap > 5*time.Second {
			t.Errorf("%s was without a feed for %v", edges[i].ID, gap)
		}
	}
	k.settled(k.replicas, all...)
	k.check()
	k.agree()
}

// agree checks that all replicas say the same of the fleet.
func (k *killed) agree() {
	harness.Settle(k.t, func() error {
		var first string
		for _, replica := range k.replicas {
			now := k.status(replica)
			keyring, err := k.KeyringAt(replica, "default")
			if err != nil {
				return err
			}
			history := k.TryCtlAt(replica, "history", "-n", "5").Stdout
			said := fmt.Sprint(now.Edges, len(now.Replicas), now.Problems, keyring.Newest(), keyring.Laggards, history)
			if first == "" {
				first = said
			}
			if said != first || len(now.Replicas) != len(k.replicas) || len(keyring.Laggards) > 0 {
				return fmt.Errorf("replica %s says\n%s\nand another one\n%s", replica.Address, said, first)
			}
		}
		return nil
	})
}
