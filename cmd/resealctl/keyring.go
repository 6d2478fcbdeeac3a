package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newKeyringCommand(a *app) *cobra.Command {
	return newGroupCommand("keyring", "Show, rotate and revoke ticket keys",
		`Show, rotate and revoke the keys of session tickets. A keyring is a sequence of
epochs. Edges decrypt with all of them and encrypt with the active one. A new
epoch is prepared on all edges before it becomes active.`,
		newKeyringStatusCommand(a), newKeyringRotateCommand(a), newKeyringRevokeCommand(a))
}

// keyringClient is the service behind these commands.
func (a *app) keyringClient() (resealv1.KeyringServiceClient, error) {
	client, err := a.connect()
	if err != nil {
		return nil, err
	}
	return resealv1.NewKeyringServiceClient(client.conn), nil
}

func (a *app) completeKeyrings(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, noFiles
	}
	return startingWith(a.names(cmd, "keyrings"), typed), noFiles
}

// keyringError names the keyring when a call about it finds that there is none.
func keyringError(name string, err error) error {
	if errors.Is(err, errNotFound) && strings.Contains(err.Error(), "Keyring/") {
		return notFound("keyring", name)
	}
	return err
}

// The views are what -o json and yaml show.

type keyringsView struct {
	Leader   string        `json:"leader"`
	Keyrings []keyringView `json:"keyrings"`
}

type keyringView struct {
	Name               string             `json:"name"`
	Epochs             []epochView        `json:"epochs"`
	Edges              []edgeCoverageView `json:"edges"`
	Laggards           []string           `json:"laggards"`
	ActivationDeadline string             `json:"activationDeadline,omitempty"`
	NextRotation       string             `json:"nextRotation,omitempty"`
	Problem            string             `json:"problem,omitempty"`
}

type epochView struct {
	Number      uint64 `json:"number"`
	State       string `json:"state"`
	PreparedAt  string `json:"preparedAt,omitempty"`
	ActivatedAt string `json:"activatedAt,omitempty"`
	RetiredAt   string `json:"retiredAt,omitempty"`
	EraseAt     string `json:"eraseAt,omitempty"`
}

type edgeCoverageView struct {
	Edge   string   `json:"edge"`
	Epochs []uint64 `json:"epochs"`
	Active uint64   `json:"active"`
}

func viewKeyrings(response *resealv1.StatusResponse) keyringsView {
	view := keyringsView{Leader: response.GetLeader(), Keyrings: []keyringView{}}
	for _, k := range response.GetKeyrings() {
		v := keyringView{
			Name: k.GetName(), Epochs: []epochView{}, Edges: []edgeCoverageView{}, Laggards: append([]string{}, k.GetLaggards()...),
			ActivationDeadline: utcStamp(k.GetActivationDeadline()), NextRotation: utcStamp(k.GetNextRotation()), Problem: k.GetProblem(),
		}
		for _, e := range k.GetEpochs() {
			v.Epochs = append(v.Epochs, epochView{
				Number: e.GetNumber(), State: resealv1.Label(e.GetState()), PreparedAt: utcStamp(e.GetPreparedAt()),
				ActivatedAt: utcStamp(e.GetActivatedAt()), RetiredAt: utcStamp(e.GetRetiredAt()), EraseAt: utcStamp(e.GetEraseAt()),
			})
		}
		for _, e := range k.GetEdges() {
			v.Edges = append(v.Edges, edgeCoverageView{Edge: e.GetEdge(), Epochs: append([]uint64{}, e.GetEpochs()...), Active: e.GetActive()})
		}
		view.Keyrings = append(view.Keyrings, v)
	}
	return view
}

func newKeyringStatusCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [NAME]",
		Short: "Show the epochs of keyrings and which edges hold them",
		Long: `Show the epochs of keyrings, and how many of the live edges that a keyring
selects hold each. With a NAME, or when there is only one keyring, also what each
edge holds.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeKeyrings,
	}
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := a.keyringClient()
		if err != nil {
			return err
		}
		name := strings.Join(args, "")
		response, err := client.Status(cmd.Context(), &resealv1.StatusRequest{Keyring: name})
		if err != nil {
			return keyringError(name, err)
		}
		if format.structured() {
			return a.printDocument(format, viewKeyrings(response))
		}
		a.printKeyrings(response)
		return nil
	}
	return cmd
}

func (a *app) printKeyrings(response *resealv1.StatusResponse) {
	if len(response.GetKeyrings()) == 0 {
		a.warnf("No keyrings.\n")
		return
	}
	t := newTable(a.out, "KEYRING", "EPOCH", "STATE", "AGE", "EDGES", "NEXT")
	for _, k := range response.GetKeyrings() {
		if len(k.GetEpochs()) == 0 {
			t.add(k.GetName(), "<none>", "", "", fmt.Sprint(len(k.GetEdges())), "")
		}
		for _, e := range k.GetEpochs() {
			t.add(k.GetName(), fmt.Sprint(e.GetNumber()), epochState(e), age(epochSince(e)), holders(k, e.GetNumber()), epochNext(k, e))
		}
	}
	t.flush()
	if len(response.GetKeyrings()) == 1 {
		a.printHolders(response.GetKeyrings()[0])
	}
	for _, k := range response.GetKeyrings() {
		if len(k.GetLaggards()) > 0 {
			a.printf("\n%s\n", printable(laggardsText(k)))
		}
		if k.GetProblem() != "" {
			a.printf("\nKeyring %s can't be read, edges keep the keys that they have: %s\n", k.GetName(), printable(k.GetProblem()))
		}
	}
	if response.GetLeader() == "" {
		a.printf("\nNo replica rotates now: there is no leader.\n")
	} else {
		a.printf("\nRotated by %s.\n", printable(response.GetLeader()))
	}
}

// printHolders shows what each edge holds.
func (a *app) printHolders(k *resealv1.KeyringStatus) {
	if len(k.GetEdges()) == 0 {
		a.printf("\nNo live edge is selected.\n")
		return
	}
	a.printf("\n")
	t := newTable(a.out, "EDGE", "ENCRYPTS WITH", "HOLDS")
	for _, e := range k.GetEdges() {
		encrypts := "<none>"
		if e.GetActive() > 0 {
			encrypts = fmt.Sprint(e.GetActive())
		}
		t.add(e.GetEdge(), encrypts, runs(e.GetEpochs()))
	}
	t.flush()
}

func epochState(e *resealv1.Epoch) string { return strings.ToUpper(resealv1.Label(e.GetState())) }

// epochSince is when an epoch came into its state.
func epochSince(e *resealv1.Epoch) *timestamppb.Timestamp {
	switch e.GetState() {
	case resealv1.EpochState_EPOCH_STATE_ACTIVE:
		return e.GetActivatedAt()
	case resealv1.EpochState_EPOCH_STATE_RETIRED:
		return e.GetRetiredAt()
	}
	return e.GetPreparedAt()
}

// newestEpoch is the one that edges should have acked.
func newestEpoch(k *resealv1.KeyringStatus) *resealv1.Epoch {
	if epochs := k.GetEpochs(); len(epochs) > 0 {
		return epochs[len(epochs)-1]
	}
	return nil
}

func findEpoch(k *resealv1.KeyringStatus, number uint64) *resealv1.Epoch {
	i := slices.IndexFunc(k.GetEpochs(), func(e *resealv1.Epoch) bool { return e.GetNumber() == number })
	if i < 0 {
		return nil
	}
	return k.GetEpochs()[i]
}

func holders(k *resealv1.KeyringStatus, number uint64) string {
	count := 0
	for _, e := range k.GetEdges() {
		if slices.Contains(e.GetEpochs(), number) {
			count++
		}
	}
	return fmt.Sprintf("%d/%d", count, len(k.GetEdges()))
}

// epochNext says what becomes of an epoch, and when.
func epochNext(k *resealv1.KeyringStatus, e *resealv1.Epoch) string {
	switch e.GetState() {
	case resealv1.EpochState_EPOCH_STATE_PREPARED:
		return "active when all hold it, at the latest " + until(k.GetActivationDeadline().AsTime())
	case resealv1.EpochState_EPOCH_STATE_ACTIVE:
		if k.GetNextRotation() != nil {
			return "rotated " + until(k.GetNextRotation().AsTime())
		}
		return "retired when the next is active"
	}
	return "erased " + until(e.GetEraseAt().AsTime())
}

func until(t time.Time) string {
	if left := time.Until(t); left > 0 {
		return "in " + shortDuration(left)
	}
	return "now"
}

// laggardsText names the edges that don't hold the newest epoch.
func laggardsText(k *resealv1.KeyringStatus) string {
	newest := newestEpoch(k)
	text := fmt.Sprintf("Keyring %s: epoch %d is not held yet by %s", k.GetName(), newest.GetNumber(), joinSome(k.GetLaggards(), 20))
	if newest.GetState() == resealv1.EpochState_EPOCH_STATE_PREPARED {
		return text + "; that delays it."
	}
	return text + "; tickets of it get a full handshake there."
}

// runs writes sorted numbers as "5-12,14".
func runs(numbers []uint64) string {
	var parts []string
	for i := 0; i < len(numbers); {
		j := i
		for j+1 < len(numbers) && numbers[j+1] == numbers[j]+1 {
			j++
		}
		part := fmt.Sprint(numbers[i])
		if j > i {
			part += fmt.Sprintf("-%d", numbers[j])
		}
		parts, i = append(parts, part), j+1
	}
	return orNone(strings.Join(parts, ","))
}
