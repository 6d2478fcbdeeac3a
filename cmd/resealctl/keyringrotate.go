package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// rotatePoll is the time between two looks at a rotation.
	rotatePoll = 200 * time.Millisecond
	// rotateBound is the most that edges can delay an epoch.
	rotateBound = 5 * time.Minute
	// rotateGrace is how long after its deadline an epoch may take to become
	// active: the leader may have to be elected first.
	rotateGrace = time.Minute
)

// rotation is one run of keyring rotate.
type rotation struct {
	*app
	client  resealv1.KeyringServiceClient
	keyring string
	epoch   uint64
}

func newKeyringRotateCommand(a *app) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "rotate [NAME]",
		Short: "Prepare a new epoch now",
		Long: `Prepare a new epoch of a keyring now, by default of "default". It becomes active
when all live edges hold it, or when a deadline has passed. No ticket is lost.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeKeyrings,
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "return when the new epoch is active")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := a.keyringClient()
		if err != nil {
			return err
		}
		r := &rotation{app: a, client: client, keyring: cmp.Or(strings.Join(args, ""), resealv1.DefaultKeyring)}
		response, err := client.Rotate(cmd.Context(), &resealv1.RotateRequest{Keyring: r.keyring})
		if err != nil {
			return keyringError(r.keyring, err)
		}
		r.epoch = response.GetEpoch()
		if !wait {
			a.printf("keyring/%s: epoch %d is prepared, it becomes active when all edges hold it\n", r.keyring, r.epoch)
			return nil
		}
		return r.waitUntilActive(cmd.Context())
	}
	return cmd
}

// waitUntilActive looks at the keyring until the epoch is active.
func (r *rotation) waitUntilActive(ctx context.Context) error {
	ticker := time.NewTicker(rotatePoll)
	defer ticker.Stop()
	// The server's own deadline once it is known; until then, at most this.
	deadline := time.Now().Add(rotateBound)
	for {
		response, err := r.client.Status(ctx, &resealv1.StatusRequest{Keyring: r.keyring})
		if err != nil {
			r.clearProgress()
			return keyringError(r.keyring, err)
		}
		k := response.GetKeyrings()[0]
		if done, err := r.look(k); done || err != nil {
			return err
		}
		if end := k.GetActivationDeadline(); end != nil {
			deadline = end.AsTime()
		}
		if time.Now().After(deadline.Add(rotateGrace)) {
			r.clearProgress()
			return fmt.Errorf("epoch %d of keyring %q is still not active; leader: %s", r.epoch, r.keyring, orNone(response.GetLeader()))
		}
		select {
		case <-ctx.Done():
			r.clearProgress()
			return errInterrupted
		case <-ticker.C:
		}
	}
}

// look says whether the epoch is active.
func (r *rotation) look(k *resealv1.KeyringStatus) (done bool, err error) {
	e := findEpoch(k, r.epoch)
	switch {
	case e == nil && newestEpoch(k).GetNumber() > r.epoch:
		r.clearProgress()
		return false, fmt.Errorf("epoch %d of keyring %q was revoked", r.epoch, r.keyring)
	case e == nil || e.GetState() == resealv1.EpochState_EPOCH_STATE_PREPARED:
		if r.terminal {
			steer(r.err, fmt.Sprintf("\repoch %d is held by %s edges \x1b[K", r.epoch, holders(k, r.epoch)))
		}
		return false, nil
	}
	r.clearProgress()
	r.printf("keyring/%s: epoch %d is active\n", r.keyring, r.epoch)
	if len(k.GetLaggards()) > 0 && newestEpoch(k).GetNumber() == r.epoch {
		r.warnf("Warning: %s\n", printable(laggardsText(k)))
	}
	return true, nil
}

// clearProgress removes the line that shows it.
func (r *rotation) clearProgress() {
	if r.terminal {
		steer(r.err, "\r\x1b[K")
	}
}

// revocation is one run of keyring revoke.
type revocation struct {
	*app
	client  resealv1.KeyringServiceClient
	keyring string
	epochs  []uint64
	all     bool // instead of epochs
	yes     bool
}

func newKeyringRevokeCommand(a *app) *cobra.Command {
	r := &revocation{app: a}
	var numbers []uint
	cmd := &cobra.Command{
		Use:   "revoke NAME {--epoch N... | --all}",
		Short: "Erase compromised epochs on all edges at once",
		Long: `Erase compromised epochs of a keyring on all edges at once. Their tickets become
useless. When the active epoch is among them a new one is active at once. What it
costs is said first, and has to be confirmed: on a terminal, or by --yes.`,
		Example:           "  resealctl keyring revoke default --epoch 7 --epoch 8\n  resealctl keyring revoke default --all --yes",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeKeyrings,
	}
	cmd.Flags().UintSliceVar(&numbers, "epoch", nil, "`number` of an epoch; can be given several times")
	cmd.Flags().BoolVar(&r.all, "all", false, "all epochs; a keyring that can't be read starts anew")
	cmd.Flags().BoolVar(&r.yes, "yes", false, "do not ask")
	cmd.MarkFlagsMutuallyExclusive("epoch", "all")
	cmd.MarkFlagsOneRequired("epoch", "all")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if r.all == (len(numbers) > 0) {
			return usagef("say which epochs: --epoch N or --all")
		}
		for _, number := range numbers {
			r.epochs = append(r.epochs, uint64(number))
		}
		r.keyring = args[0]
		var err error
		if r.client, err = a.keyringClient(); err != nil {
			return err
		}
		return r.run(cmd.Context())
	}
	return cmd
}

func (r *revocation) run(ctx context.Context) error {
	request := &resealv1.RevokeRequest{Keyring: r.keyring, Epochs: r.epochs, All: r.all, DryRun: true}
	cost, err := r.client.Revoke(ctx, request)
	if err != nil {
		return keyringError(r.keyring, err)
	}
	r.warnf("%s\n", costText(r.keyring, cost))
	if err := r.confirm(ctx); err != nil {
		return err
	}
	request.DryRun = false
	done, err := r.client.Revoke(ctx, request)
	if err != nil {
		return keyringError(r.keyring, err)
	}
	what := "all epochs"
	if len(done.GetEpochs()) > 0 {
		what = epochsText(done.GetEpochs())
	}
	r.printf("keyring/%s: %s revoked", r.keyring, what)
	if done.GetActive() > 0 {
		r.printf(", epoch %d is active", done.GetActive())
	}
	r.printf("\n")
	return nil
}

func epochsText(numbers []uint64) string {
	if len(numbers) == 1 {
		return fmt.Sprintf("epoch %d", numbers[0])
	}
	return "epochs " + runs(numbers)
}

// costText says what a revocation costs the clients.
func costText(keyring string, cost *resealv1.RevokeResponse) string {
	if len(cost.GetEpochs()) == 0 {
		return fmt.Sprintf("Keyring %s can't be read: it starts anew, all tickets become useless: their clients make one full handshake.", keyring)
	}
	text := fmt.Sprintf("Revoking %s of keyring %s: ", epochsText(cost.GetEpochs()), keyring)
	ticketAge := cost.GetTicketAge().AsDuration()
	if ticketAge <= 0 {
		return text + "no ticket has been issued yet, so no client notices."
	}
	return text + fmt.Sprintf("tickets issued in the last %s become useless: their clients make one full handshake.", exactAge(ticketAge))
}

// exactAge is an age with hours and minutes, rounded up, so that it never says
// too little.
func exactAge(d time.Duration) string {
	unit := time.Minute
	if d < 2*time.Minute {
		unit = time.Second
	}
	return configured(durationpb.New((d + unit - 1) / unit * unit)) //nolint:durationcheck // rounds up to a multiple of unit
}

// confirm asks on a terminal. Elsewhere nobody could answer.
func (r *revocation) confirm(ctx context.Context) error {
	switch {
	case r.yes:
		return nil
	case !r.terminal:
		return usagef("nothing was revoked: confirm with --yes, since this is not a terminal")
	}
	r.warnf("Revoke? [y/N] ")
	answer, err := readLine(ctx, r.in)
	if err != nil {
		return err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return errors.New("nothing was revoked")
}

// readLine reads a line, but not beyond the end of ctx. The process ends soon
// after that, and with it the reader.
func readLine(ctx context.Context, from io.Reader) (string, error) {
	line := make(chan string, 1)
	go func() {
		text, _ := bufio.NewReader(from).ReadString('\n') // at the end: what there is
		line <- text
	}()
	select {
	case text := <-line:
		return text, nil
	case <-ctx.Done():
		return "", errInterrupted
	}
}
