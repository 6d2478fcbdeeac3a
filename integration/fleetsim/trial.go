package fleetsim

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

const (
	// stepTimeout bounds one step of a trial.
	stepTimeout = 5 * time.Minute
	// changes is how often a trial changes one pool.
	changes = 3
)

// Trial measures one control plane, a process with an embedded store, that serves
// simulated edges.
type Trial struct {
	// Fleet runs the control plane. Required.
	Fleet *harness.Fleet
	// Size of the configuration. Required.
	Size Size
	// Edges is how many there are. Required.
	Edges int
	// Idle is for how long nothing happens while idle CPU is measured. Required.
	Idle time.Duration
	// Log is told of each step. Required.
	Log func(format string, args ...any)

	authority *peers.Authority
	control   *harness.ControlPlane
	admin     *Admin
	simulated *Fleet
	version   int // of the pool that changes
	result    Result
}

// Result is what a trial measured. CPU is the control plane's.
type Result struct {
	// Edges is how many there were.
	Edges int
	// Base is the control plane's memory before edges connected, Connected and
	// Rotated after, in bytes.
	Base, Connected, Rotated int64
	// Goroutines and Stacks, in bytes, are those of the control plane per edge, once
	// all are connected.
	Goroutines, Stacks float64
	// Connect is how long it took until all were connected first.
	Connect, ConnectCPU time.Duration
	// Idle is CPU seconds per second when nothing happens, and IdleBytes what each
	// edge reports per second.
	Idle, IdleBytes float64
	// AckP99 and AckLast are the worst of several changes of one pool, from the call
	// to the ack of 99 of 100 edges, and of all. ChangeCPU is what one costs, beyond
	// idle, and ChangeBytes what each edge gets.
	AckP99, AckLast, ChangeCPU time.Duration
	ChangeBytes                float64
	// Encrypting and Covered are how long after the call all edges encrypt with a new
	// epoch, and when the control plane knows.
	Encrypting, Covered, RotationCPU time.Duration
	// Back is how long after the control plane was killed all streams were served by
	// the next process, Down until that was ready. Peak is its most memory, in bytes.
	Back, Down, BackCPU time.Duration
	Peak                int64
	// Return is what edges did meanwhile.
	Return Counts
}

// Run does all steps. Whatever it started ends with the harness' test, except for
// the edges, which have ended when it returns.
func (t *Trial) Run(ctx context.Context) (Result, error) {
	t.result.Edges = t.Edges
	steps := []struct {
		name string
		run  func(context.Context) error
	}{
		{"prepare", t.prepare}, {"connect", t.connect}, {"idle", t.idle}, {"change", t.change}, {"rotate", t.rotate}, {"restart", t.restart}, {"settle", t.settle},
	}
	defer func() {
		if t.simulated != nil {
			t.simulated.Stop()
		}
		if t.admin != nil {
			_ = t.admin.Close()
		}
	}()
	for _, step := range steps {
		ctx, cancel := context.WithTimeout(ctx, stepTimeout)
		began := time.Now()
		err := step.run(ctx)
		cancel()
		if err != nil {
			return t.result, fmt.Errorf("%s: %w; streams ended with %v", step.name, err, t.losses())
		}
		t.Log("%d edges: %s took %s", t.Edges, step.name, time.Since(began).Round(time.Millisecond))
	}
	return t.result, nil
}

func (t *Trial) losses() map[string]int {
	if t.simulated == nil {
		return nil
	}
	return t.simulated.Losses()
}

func (t *Trial) usage() process.Usage {
	usage, err := t.control.Usage()
	if err != nil {
		t.Fleet.TB.Fatal(err)
	}
	return usage
}

// prepare enrols the edges and starts the control plane anew, so that what that
// cost is not counted.
func (t *Trial) prepare(ctx context.Context) (err error) {
	if t.authority, err = peers.NewAuthority("simulated fleet"); err != nil {
		return err
	}
	t.control = t.Fleet.StartControlPlane()
	if t.admin, err = NewAdmin(filepath.Join(t.control.DataDir, "admin.yaml"), t.control.Address); err != nil {
		return err
	}
	text, err := t.Size.Manifest(t.authority)
	if err != nil {
		return err
	}
	if _, err := t.admin.Apply(ctx, text); err != nil {
		return err
	}
	identities, err := t.admin.Enrol(ctx, t.Edges)
	if err != nil {
		return err
	}
	if err := t.control.Stop(); err != nil {
		return err
	}
	t.control.Start()
	before := t.usage()
	t.result.Base = before.Resident
	began := time.Now()
	t.simulated, err = Start(Config{Addresses: []string{t.control.Address}, Size: t.Size}, identities)
	if err != nil {
		return err
	}
	moments, err := t.simulated.Connected(ctx, began)
	if err != nil {
		return err
	}
	t.result.Connect, t.result.ConnectCPU = moments.Last().Sub(began), t.usage().CPU-before.CPU
	return nil
}

// connect looks at what connected edges cost, after a moment for first reports.
func (t *Trial) connect(ctx context.Context) error {
	if err := sleep(ctx, reportInterval); err != nil {
		return err
	}
	t.result.Connected = t.usage().Resident
	metrics := t.control.Metrics()
	t.result.Goroutines = metrics.Sum("go_goroutines") / float64(t.Edges)
	t.result.Stacks = metrics.Sum("go_memstats_stack_inuse_bytes") / float64(t.Edges)
	return nil
}

func (t *Trial) idle(ctx context.Context) error {
	before, counted := t.usage(), t.simulated.Counts()
	if err := sleep(ctx, t.Idle); err != nil {
		return err
	}
	t.result.Idle = (t.usage().CPU - before.CPU).Seconds() / t.Idle.Seconds()
	t.result.IdleBytes = float64(t.simulated.Counts().Minus(counted).ReportBytes) / float64(t.Edges) / t.Idle.Seconds()
	return nil
}

// beyondIdle is the CPU that was used since before, without what would have been used
// anyhow.
func (t *Trial) beyondIdle(before process.Usage, since time.Time) time.Duration {
	return max(t.usage().CPU-before.CPU-time.Duration(t.result.Idle*float64(time.Since(since))), 0)
}

func (t *Trial) change(ctx context.Context) error {
	counted := t.simulated.Counts()
	for range changes {
		t.version++
		before, began := t.usage(), time.Now()
		revision, err := t.admin.Apply(ctx, t.Size.Pool(t.authority, 0, t.version))
		if err != nil {
			return err
		}
		moments, err := t.simulated.Acked(ctx, revision)
		if err != nil {
			return err
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
		t.result.ChangeCPU += t.beyondIdle(before, began) / changes
		t.result.AckP99 = max(t.result.AckP99, moments.P99().Sub(began))
		t.result.AckLast = max(t.result.AckLast, moments.Last().Sub(began))
	}
	t.result.ChangeBytes = float64(t.simulated.Counts().Minus(counted).UpdateBytes) / float64(t.Edges) / changes
	return nil
}

func (t *Trial) rotate(ctx context.Context) error {
	before, began := t.usage(), time.Now()
	epoch, err := t.admin.Rotate(ctx)
	if err != nil {
		return err
	}
	moments, err := t.simulated.Encrypting(ctx, epoch)
	if err != nil {
		return err
	}
	t.result.Encrypting = moments.Last().Sub(began)
	for covered := 0; covered < t.Edges; {
		if covered, err = t.admin.Covered(ctx, epoch); err != nil {
			return err
		}
		t.result.Covered = time.Since(began)
		if err := sleep(ctx, 250*time.Millisecond); err != nil {
			return err
		}
	}
	t.result.RotationCPU = t.beyondIdle(before, began)
	t.result.Rotated = t.usage().Resident
	return nil
}

// restart kills the control plane and starts the next at once.
func (t *Trial) restart(ctx context.Context) error {
	counted, began := t.simulated.Counts(), time.Now()
	t.control.Kill()
	t.control.Start()
	t.result.Down = time.Since(began)
	moments, err := t.simulated.Connected(ctx, began)
	if err != nil {
		return err
	}
	usage := t.usage()
	t.result.Back, t.result.BackCPU, t.result.Peak = moments.Last().Sub(began), usage.CPU, usage.Peak
	t.result.Return = t.simulated.Counts().Minus(counted)
	return nil
}

// settle waits until the control plane tells of all edges what they are and counted.
func (t *Trial) settle(ctx context.Context) error {
	for want := uint64(t.Edges) * servedRequests; ; {
		synced, err := t.admin.Synced(ctx)
		if err != nil {
			return err
		}
		requests, err := t.admin.Requests(ctx, poolName(0))
		if err != nil {
			return err
		}
		if synced == t.Edges && requests == want {
			return nil
		}
		if err := sleep(ctx, 250*time.Millisecond); err != nil {
			return fmt.Errorf("%d of %d edges are synced, %d requests of %d are known: %w", synced, t.Edges, requests, want, err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
