package main

import (
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newAuthCommand(a *app) *cobra.Command {
	return newGroupCommand("auth", "Show who you are and what you may do",
		"Show who you are and what you may do.", newCanICommand(a), newWhoamiCommand(a))
}

// deed is something that people do to a noun of this command, and the method that
// it takes.
type deed struct {
	nouns  []string // none means resources of any kind
	verbs  []string
	method string
}

var deeds = []deed{
	{nil, []string{"get", "describe"}, resealv1.AdminService_Get_FullMethodName},
	{nil, []string{"list"}, resealv1.AdminService_List_FullMethodName},
	{nil, []string{"watch"}, resealv1.AdminService_Watch_FullMethodName},
	{nil, []string{"apply", "create", "update", "patch", "diff"}, resealv1.AdminService_Apply_FullMethodName},
	{nil, []string{"delete"}, resealv1.AdminService_Delete_FullMethodName},
	{nil, []string{"rollback"}, resealv1.AdminService_Rollback_FullMethodName},
	{nil, []string{"history"}, resealv1.AdminService_ListRevisions_FullMethodName},
	{[]string{"history", "revisions", "revision"}, []string{"get", "list"}, resealv1.AdminService_ListRevisions_FullMethodName},
	{[]string{"history", "revisions", "revision"}, []string{"rollback"}, resealv1.AdminService_Rollback_FullMethodName},
	{[]string{"edges", "edge"}, []string{"get", "list", "describe"}, resealv1.FleetService_ListEdges_FullMethodName},
	{[]string{"edges", "edge"}, []string{"watch"}, resealv1.FleetService_WatchEdges_FullMethodName},
	{[]string{"edges", "edge"}, []string{"drain"}, resealv1.FleetService_DrainEdge_FullMethodName},
	{[]string{"edges", "edge"}, []string{"probe"}, resealv1.FleetService_ProbeBackend_FullMethodName},
	{[]string{"failures", "failure"}, []string{"get", "list"}, resealv1.FleetService_ListFailures_FullMethodName},
	{[]string{"requests", "request"}, []string{"observe"}, resealv1.FleetService_ObserveRequests_FullMethodName},
	{[]string{"keyrings", "keyring"}, []string{"status"}, resealv1.KeyringService_Status_FullMethodName},
	{[]string{"keyrings", "keyring"}, []string{"rotate"}, resealv1.KeyringService_Rotate_FullMethodName},
	{[]string{"keyrings", "keyring"}, []string{"revoke"}, resealv1.KeyringService_Revoke_FullMethodName},
	{[]string{"stats"}, []string{"get", "list"}, resealv1.TallyService_GetStats_FullMethodName},
	{[]string{"stats"}, []string{"watch"}, resealv1.TallyService_WatchStats_FullMethodName},
	{[]string{"tokens", "token"}, []string{"create"}, resealv1.EnrollmentService_CreateToken_FullMethodName},
	{[]string{"tokens", "token"}, []string{"get", "list"}, resealv1.EnrollmentService_ListTokens_FullMethodName},
	{[]string{"tokens", "token"}, []string{"revoke", "delete"}, resealv1.EnrollmentService_RevokeToken_FullMethodName},
	{[]string{"users", "user"}, []string{"create"}, resealv1.EnrollmentService_CreateUser_FullMethodName},
	{[]string{"users", "user"}, []string{"get", "list"}, resealv1.EnrollmentService_ListUsers_FullMethodName},
	{[]string{"users", "user"}, []string{"revoke", "delete"}, resealv1.EnrollmentService_RevokeUser_FullMethodName},
	{[]string{"edges", "edge"}, []string{"revoke"}, resealv1.EnrollmentService_RevokeEdge_FullMethodName},
	{[]string{"rollouts", "rollout"}, []string{"get", "status"}, resealv1.FleetService_GetRollout_FullMethodName},
	{[]string{"rollouts", "rollout"}, []string{"watch"}, resealv1.FleetService_WatchRollout_FullMethodName},
	{[]string{"rollouts", "rollout"}, []string{"pause"}, resealv1.FleetService_PauseRollout_FullMethodName},
	{[]string{"rollouts", "rollout"}, []string{"resume"}, resealv1.FleetService_ResumeRollout_FullMethodName},
	{[]string{"rollouts", "rollout"}, []string{"undo"}, resealv1.FleetService_UndoRollout_FullMethodName},
	{[]string{"audit"}, []string{"get", "list", "watch"}, resealv1.AdminService_ReadAudit_FullMethodName},
	{[]string{"backups", "backup"}, []string{"create"}, resealv1.BackupService_Backup_FullMethodName},
}

// methodOf finds the method for a verb and a noun.
func methodOf(verb, noun string) (string, error) {
	verb, noun = strings.ToLower(verb), strings.ToLower(noun)
	noun, _, _ = strings.Cut(noun, "/")
	// A Keyring is a resource with which more can be done.
	_, resource := manifest.KindByName(noun)
	resource = resource || noun == "*" || noun == kindAll
	if !resource && !slices.ContainsFunc(deeds, func(d deed) bool { return slices.Contains(d.nouns, noun) }) {
		return "", usagef("there is no %q; there are %s, history, stats, tokens, users, rollouts, audit and backups", noun, kindList())
	}
	var verbs []string
	for _, d := range deeds {
		if !slices.Contains(d.nouns, noun) && !(resource && len(d.nouns) == 0) {
			continue
		}
		if slices.Contains(d.verbs, verb) {
			return d.method, nil
		}
		verbs = append(verbs, d.verbs...)
	}
	return "", usagef("%q can't be done with %s; try %s", verb, noun, strings.Join(verbs, ", "))
}

func newCanICommand(a *app) *cobra.Command {
	var list bool
	cmd := &cobra.Command{
		Use:   "can-i {VERB RESOURCE | --list}",
		Short: "Say whether your role may do something",
		Long: `Say whether the role in your certificate may do something. It prints yes or no
and exits with 0 or 1. --list shows all that it may. The control plane is not
asked.`,
		Example:           "  resealctl auth can-i apply backendpools\n  resealctl auth can-i create tokens\n  resealctl auth can-i --list",
		ValidArgsFunction: completeDeeds,
		Args: func(cmd *cobra.Command, args []string) error {
			if list {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.ExactArgs(2)(cmd, args)
		},
	}
	cmd.Flags().BoolVar(&list, "list", false, "show all that your role may do")
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		switch {
		case list:
			return a.printDeeds(format)
		case format.structured():
			return usagef("-o %s needs --list", format.value)
		}
		return a.canI(args[0], args[1])
	}
	return cmd
}

func (a *app) canI(verb, noun string) error {
	method, err := methodOf(verb, noun)
	if err != nil {
		return err
	}
	t, err := a.target()
	if err != nil {
		return err
	}
	who, err := t.identity()
	if err != nil {
		return err
	}
	if who.mayCall(method) {
		a.printf("yes\n")
		return nil
	}
	a.printf("no\n")
	return &exitError{code: exitFailure}
}

// deedsView is what may be done with a noun, as -o json and yaml show it.
type deedsView struct {
	Resource string   `json:"resource"`
	Verbs    []string `json:"verbs"`
}

// deedsOf are all deeds that an identity may do, by noun.
func deedsOf(who identity) []deedsView {
	var views []deedsView
	for _, d := range deeds {
		if !who.mayCall(d.method) {
			continue
		}
		noun := "*"
		if len(d.nouns) > 0 {
			noun = d.nouns[0]
		}
		at := slices.IndexFunc(views, func(v deedsView) bool { return v.Resource == noun })
		if at < 0 {
			at, views = len(views), append(views, deedsView{Resource: noun})
		}
		views[at].Verbs = append(views[at].Verbs, d.verbs...)
	}
	return views
}

func (a *app) printDeeds(f *format) error {
	t, err := a.target()
	if err != nil {
		return err
	}
	who, err := t.identity()
	if err != nil {
		return err
	}
	views := deedsOf(who)
	if f.structured() {
		return a.printDocument(f, map[string]any{"name": who.name, "role": resealv1.Label(who.role), "may": views})
	}
	table := newTable(a.out, "RESOURCE", "VERBS")
	for _, v := range views {
		table.add(v.Resource, strings.Join(v.Verbs, ", "))
	}
	table.flush()
	return nil
}

// whoamiView is an identity as -o json and yaml show it.
type whoamiView struct {
	Name         string   `json:"name"`
	Role         string   `json:"role"`
	TrustDomain  string   `json:"trustDomain"`
	Expires      string   `json:"expires"`
	Context      string   `json:"context"`
	ControlPlane []string `json:"controlPlane"`
}

func newWhoamiCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "whoami",
		Short: "Show the identity in your certificate",
		Args:  cobra.NoArgs,
	}
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(*cobra.Command, []string) error {
		t, err := a.target()
		if err != nil {
			return err
		}
		who, err := t.identity()
		if err != nil {
			return err
		}
		if format.structured() {
			return a.printDocument(format, whoamiView{who.name, resealv1.Label(who.role), who.trustDomain,
				who.expires.UTC().Format(time.RFC3339), t.name, t.controlPlane})
		}
		d := describer{w: a.out}
		d.line(0, "Name", who.name)
		d.line(0, "Role", resealv1.Label(who.role))
		d.line(0, "Trust domain", who.trustDomain)
		d.line(0, "Expires", who.expires.Local().Format(time.RFC3339)+" ("+expiry(who.expires)+")")
		d.line(0, "Context", orNone(t.name))
		d.line(0, "Control plane", strings.Join(t.controlPlane, ", "))
		d.flush()
		return nil
	}
	return cmd
}
